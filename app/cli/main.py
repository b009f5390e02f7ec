"""The command `klein`: its parser and the dispatch to one module per command, nothing else."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from app import __version__
from app.cli.console import add_options, note
from app.cli.old_cache import find_old_cache
from app.cli.system_limits import check_surroundings, explain
from app.errors import KleinError
from app.model_choice import read_settings


@dataclass(frozen=True, slots=True)
class Command:
    """One command, described without importing it.

    *module* has `OPTIONS` and `run(arguments, settings)`, which returns the exit code; it is
    imported only where the command is called.
    """

    module: str
    help: str
    settings: tuple[str, ...] = ("model",)
    """Its options that override the setting of the same name."""
    loads_model: bool = False
    """Whether it computes, and so needs a thread for each core."""
    checks_settings_first: bool = False
    """Whether the environment is checked before the module's slow imports."""
    reports_old_cache: bool = False
    """Whether it reports an old cache in its own way."""


COMMANDS: dict[str, Command] = {
    "serve": Command(
        "app.cli.serve",
        "start the service",
        settings=("host", "port", "model"),
        loads_model=True,
        checks_settings_first=True,
        reports_old_cache=True,
    ),
    "generate": Command(
        "app.cli.generate", "make one picture and write it to a file", loads_model=True
    ),
    "download": Command(
        "app.cli.download",
        "fetch a model's files, or check those in place",
        settings=("model", "precision"),
    ),
    "doctor": Command(
        "app.cli.doctor.command",
        "say what will be served here, and what is amiss",
        reports_old_cache=True,
    ),
    "cache": Command(
        "app.cli.cache", "list what lies on the disk, or delete what can be made again"
    ),
    "lora": Command("app.cli.lora", "list, add, remove or check adapters (LoRA)"),
    "bench": Command(
        "app.cli.bench.command", "measure how fast this card makes pictures", loads_model=True
    ),
    "selftest": Command(
        "app.cli.selftest", "check the pictures of these weights, for a report", loads_model=True
    ),
    "compare": Command(
        "app.cli.compare", "make one picture at several precisions", loads_model=True
    ),
}
"""Every command by its name; a new one is one entry here and its module."""

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
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            # Here, and not when Python exits: a broken pipe could not be caught there.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KleinError as error:
        note(error.message)
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, MemoryError) as error:
        is_quiet = isinstance(error, BrokenPipeError) and _is_unread()
        if is_quiet or not (sentence := explain(error)):
            raise
        if os.environ.get("KLEIN_LOG_LEVEL") == "debug":
            traceback.print_exc()
        _drop_output()
        note(sentence)
        return 1


def _is_unread() -> bool:
    """Return whether the broken pipe is this process's own output, not one to another process."""
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Redirect the output to the null device: Python would flush again at exit, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _run(words: Sequence[str]) -> int:
    # None of klein's own options has a value, so the first word without a dash is the command.
    name = next((word for word in words if not word.startswith("-")), "")
    command = COMMANDS.get(name)
    check_surroundings(is_computing=command is not None and command.loads_model)
    parser = argparse.ArgumentParser(
        prog="klein", description="Serve one warm FLUX.2 klein pipeline over HTTP."
    )
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    options = {each: parsers.add_parser(each, help=COMMANDS[each].help) for each in COMMANDS}
    if command is not None:
        if command.checks_settings_first:
            read_settings(os.environ)
        add_options(options[name], import_module(command.module).OPTIONS)
    arguments = parser.parse_args(words)
    assert command is not None, "argparse ends the program where no command is named"
    settings = read_settings(
        os.environ, **{option: getattr(arguments, option) for option in command.settings}
    )
    if not command.reports_old_cache and (old := find_old_cache(settings)) is not None:
        note(old.sentence)
    return int(import_module(command.module).run(arguments, settings))
