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
from app.cli.console import COMMON, REFUSED_KEYS, add_options, note
from app.cli.environment import own_settings, take_env_file
from app.cli.system_limits import check_surroundings, explain
from app.errors import KleinError

EXIT_CODES = {
    0: "done",
    1: "not done; one sentence on standard error says why",
    2: "the words of the command are wrong; its usage is printed",
    130: "interrupted by Ctrl-C",
}
"""What the exit code says."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command, described without importing it.

    *module* has `OPTIONS` and `run(arguments, settings)`, which returns the exit code; it is
    imported only where the command is called.
    """

    module: str
    help: str
    settings: tuple[str, ...] | None = ("model",)
    """Its options that override the setting of the same name. None: `run` gets the environment
    instead of settings, which are slow to read."""
    loads_model: bool = False
    """Whether it computes, and so needs a thread for each core."""
    checks_settings_first: bool = False
    """Whether the environment is checked before the module's slow imports, and must hold nothing
    that is no setting of the service."""
    reports_old_cache: bool = False
    """Whether it reports an old cache in its own way."""


_LOADING = ("model", "precision", "plan", "cache_dir")

COMMANDS: dict[str, Command] = {
    "serve": Command(
        "app.cli.serve",
        "start the service",
        settings=("host", "port", *_LOADING),
        loads_model=True,
        checks_settings_first=True,
        reports_old_cache=True,
    ),
    "generate": Command(
        "app.cli.generate",
        "make pictures by the service that runs here, and write them to files",
        settings=None,
        loads_model=True,
    ),
    "queue": Command("app.cli.client.queue", "list your own jobs that wait or run", settings=None),
    "cancel": Command("app.cli.client.cancel", "take back jobs of your own", settings=None),
    "sleep": Command(
        "app.cli.client.sleep", "have the service free the card until it is needed", settings=None
    ),
    "wake": Command("app.cli.client.wake", "have the service load the model again", settings=None),
    "models": Command("app.cli.client.models", "list what the service serves", settings=None),
    "loras": Command(
        "app.cli.client.loras", "list the adapters that the service knows", settings=None
    ),
    "download": Command(
        "app.cli.download",
        "fetch a model's files, or check those in place",
        settings=("model", "precision", "cache_dir"),
    ),
    "doctor": Command(
        "app.cli.doctor.command",
        "say what will be served here, and what is amiss",
        settings=_LOADING,
        reports_old_cache=True,
    ),
    "cache": Command(
        "app.cli.cache",
        "list what lies on the disk, or delete what can be made again",
        settings=("model", "cache_dir"),
    ),
    "lora": Command(
        "app.cli.lora",
        "list, add, remove or check adapters (LoRA)",
        settings=("model", "cache_dir"),
    ),
    "cluster": Command(
        "app.cli.cluster",
        "write what Ray Serve needs to run this service on several cards or machines",
        settings=_LOADING,
    ),
    "bench": Command(
        "app.cli.bench.command",
        "measure how fast this card makes pictures",
        settings=("model", "plan", "cache_dir"),
        loads_model=True,
    ),
    "selftest": Command(
        "app.cli.selftest",
        "check the pictures of these weights, for a report",
        settings=_LOADING,
        loads_model=True,
    ),
    "compare": Command(
        "app.cli.compare",
        "make one picture at several precisions",
        settings=("model", "plan", "cache_dir"),
        loads_model=True,
    ),
    "completion": Command(
        "app.cli.completion", "print what makes a shell complete these commands", settings=None
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


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of `klein`, and that of each command, which has no options yet."""
    parser = argparse.ArgumentParser(
        prog="klein",
        description="Serve one warm FLUX.2 klein pipeline over HTTP, and ask it for pictures.",
        epilog="Exit codes: "
        + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
        + ".",
        allow_abbrev=False,
    )
    parser.add_argument(*REFUSED_KEYS.split(), **COMMON[REFUSED_KEYS])
    parser.add_argument("--version", action="version", version=f"klein {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    return parser, {
        name: parsers.add_parser(
            name, help=command.help, description=f"{_capital(command.help)}.", allow_abbrev=False
        )
        for name, command in COMMANDS.items()
    }


def add_all_options(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """Add the options of every command to its parser; this imports all of their modules."""
    for name, parser in parsers.items():
        add_options(parser, import_module(COMMANDS[name].module).OPTIONS)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _run(words: Sequence[str]) -> int:
    # None of klein's own options has a value, so the first word without a dash is the command.
    name = next((word for word in words if not word.startswith("-")), "")
    command = COMMANDS.get(name)
    check_surroundings(is_computing=command is not None and command.loads_model)
    parser, parsers = make_parser()
    if command is not None:
        take_env_file(words, os.environ)
        if command.checks_settings_first:
            from app.model_choice import read_settings

            read_settings(os.environ)
        add_options(parsers[name], import_module(command.module).OPTIONS)
    arguments, unknown = parser.parse_known_args(words)
    assert command is not None, "argparse ends the program where no command is named"
    if unknown:
        parsers[name].error(f"unrecognized arguments: {' '.join(unknown)}")
    run = import_module(command.module).run
    if command.settings is None:
        return int(run(arguments, os.environ))
    settings = own_settings(
        os.environ, **{option: getattr(arguments, option) for option in command.settings}
    )
    if not command.reports_old_cache:
        from app.cli.old_cache import tell_old_cache

        tell_old_cache(settings)
    return int(run(arguments, settings))
