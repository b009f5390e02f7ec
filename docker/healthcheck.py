"""Exit 0 while the service in this container answers /health/live, 1 otherwise.

Plain http.client: it reads no proxy settings, which would send a question to ourselves elsewhere.
"""

import http.client
import os
import sys


def is_alive(port: int) -> bool:
    """Ask the service on loopback; no answer within four seconds is a no."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if is_alive(int(os.environ.get("KLEIN_PORT") or 8000)) else 1)
