"""The command line: one module or package per command; knows no HTTP request."""

import sys

# Here, since the modules' imports of resource and fcntl fail on Windows.
if sys.platform == "win32":
    raise SystemExit(
        "klein: Windows itself is not supported; run klein-server in WSL2 or in Docker Desktop "
        "(docker compose up), which both reach the card."
    )
