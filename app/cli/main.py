"""The command `klein`: its parser and the dispatch to one module per command, nothing else."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module

from app import __version__
from app.cli.old_cache import find_old_cache
from app.cli.system_limits import check_surroundings, explain
from app.errors import KleinError
from app.model_choice import read_settings

_COMMANDS = {
    "serve": "app.cli.serve",
    "generate": "app.cli.generate",
    "download": "app.cli.download",
    "doctor": "app.cli.doctor.command",
    "bench": "app.cli.bench.command",
    "compare": "app.cli.compare.command",
}
"""The module of each command, imported only where it is called or all are listed."""
_COMPUTING = {"serve", "generate", "bench", "compare"}
_NAMING = {"serve", "doctor"}
"""Commands that report an old cache in their own ways."""

EXIT_BROKEN_PIPE = 141
"""A shell's exit code for a program that SIGPIPE ended, as when `head` has read enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        return _told(argv)
    except BrokenPipeError:
        # The reader has closed standard output or, with `2>&1 | head`, standard error too.
        _drop_output()
        return EXIT_BROKEN_PIPE


def _told(argv: Sequence[str] | None) -> int:
    """Run the command; report what prevents it as one sentence on standard error."""
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            check_surroundings(is_computing=not _COMPUTING.isdisjoint(words[:1]))
            return _run(words)
        finally:
            # Here, and not when Python exits: a broken pipe could not be caught there.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KleinError as error:
        return _say(error.message)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, MemoryError) as error:
        is_quiet = isinstance(error, BrokenPipeError) and _is_unread()
        if is_quiet or not (sentence := explain(error)):
            raise
        if os.environ.get("KLEIN_LOG_LEVEL") == "debug":
            traceback.print_exc()
        _drop_output()
        return _say(sentence)


def _say(sentence: str) -> int:
    print(f"klein: {sentence}", file=sys.stderr, flush=True)
    return 1


def _is_unread() -> bool:
    """Return whether the broken pipe is this process's own output, not one to another process."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Redirect the output to the null device: Python would flush again at exit, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _run(words: Sequence[str]) -> int:
    if "serve" in words:
        # An invalid setting is reported before slow imports.
        read_settings(os.environ)
    parser = argparse.ArgumentParser(
        prog="klein", description="Serve one warm FLUX.2 klein pipeline over HTTP."
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in _needed(words):
        import_module(_COMMANDS[command]).add_parser(commands)
    arguments = parser.parse_args(words)
    settings = read_settings(os.environ, **arguments.settings(arguments))
    if arguments.command not in _NAMING and (old := find_old_cache(settings)) is not None:
        print(f"klein: {old.sentence}", file=sys.stderr, flush=True)
    return int(arguments.run(arguments, settings))


def _needed(words: Sequence[str]) -> Iterable[str]:
    """Return the commands to import: only the one that was called, or all, to list them."""
    first = words[0] if words else ""
    if first == "--version":
        return ()
    return (first,) if first in _COMMANDS else _COMMANDS
