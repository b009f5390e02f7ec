"""The command `klein`: its parser and the dispatch to one module per command, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from app import __version__
from app.errors import KleinError
from app.settings import Settings

_COMMANDS = ("serve", "generate", "download", "doctor", "bench", "compare")


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
    words = sys.argv[1:] if argv is None else argv
    if "serve" in words:
        # A bad setting is told before anything that takes long to import.
        Settings.read(os.environ)
    parser = argparse.ArgumentParser(
        prog="klein", description="Serve one warm FLUX.2 klein pipeline over HTTP."
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in _needed(words):
        import_module(f"app.cli.{command}").add_parser(commands)
    arguments = parser.parse_args(argv)
    settings = Settings.read(os.environ, **arguments.settings(arguments))
    return int(arguments.run(arguments, settings))


def _needed(words: Sequence[str]) -> Sequence[str]:
    """Return the commands to import: only the one that was called, or all, to list them."""
    first = words[0] if words else ""
    if first == "--version":
        return ()
    return (first,) if first in _COMMANDS else _COMMANDS
