"""`python -m app` is the command `klein`."""

from app.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
