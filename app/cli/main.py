"""The command `klein`: its parser and the dispatch to one module per command, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from app import __version__
from app.errors import KleinError
from app.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        return _run(argv)
    except KleinError as error:
        print(f"klein: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str] | None) -> int:
    if "serve" in (sys.argv if argv is None else argv):
        # A bad setting is told before anything that takes long to import.
        Settings.read(os.environ)
    from app.cli import bench, compare, doctor, download, generate, serve

    parser = argparse.ArgumentParser(
        prog="klein", description="Serve one warm FLUX.2 klein pipeline over HTTP."
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (serve, generate, download, doctor, bench, compare):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    settings = Settings.read(os.environ, **arguments.settings(arguments))
    return int(arguments.run(arguments, settings))
