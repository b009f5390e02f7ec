"""A command is one entry of the registry; `klein` knows nothing else of it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from types import ModuleType

import pytest

from app.cli.main import COMMANDS, Command, main
from app.errors import StartupError
from app.settings import Settings


@pytest.fixture
def dummy(monkeypatch) -> list[tuple[argparse.Namespace, Settings]]:
    """A command `dummy`, registered by one entry; the runs of it."""
    module, runs = ModuleType("dummy_command"), []

    def run(arguments: argparse.Namespace, settings: Settings) -> int:
        if arguments.fail:
            raise StartupError("The dummy cannot start.")
        runs.append((arguments, settings))
        return 7

    module.OPTIONS = {"--model": {}, "--fail": {"action": "store_true"}}
    module.run = run
    monkeypatch.setitem(sys.modules, "dummy_command", module)
    monkeypatch.setitem(COMMANDS, "dummy", Command("dummy_command", "do as tests do"))
    return runs


def test_a_command_is_listed_by_its_entry(dummy, capsys) -> None:
    """Its help line comes from the registry; its own `--help` from its module."""
    for words in (["--help"], ["dummy", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0

    said = capsys.readouterr().out
    assert "do as tests do" in said
    assert "--fail" in said


def test_a_command_runs_with_settings(dummy, monkeypatch) -> None:
    """From the environment, where its options do not override them; its exit code is klein's."""
    monkeypatch.setenv("KLEIN_PORT", "8123")
    monkeypatch.setenv("KLEIN_MODEL", "flux.2-klein-4b")

    assert main(["dummy", "--model", "shapes"]) == 7
    ((_, settings),) = dummy
    assert (settings.model, settings.port) == ("shapes", 8123)


def test_a_commands_error_is_one_sentence(dummy, capsys) -> None:
    """On standard error, with exit code 1."""
    assert main(["dummy", "--fail"]) == 1
    assert capsys.readouterr().err == "klein: The dummy cannot start.\n"


def test_what_prevents_every_command_prevents_it_too(dummy, monkeypatch, capsys) -> None:
    """A setting that is none is named before it runs."""
    monkeypatch.setenv("KLEIN_PROT", "8123")

    assert main(["dummy"]) == 1
    assert "KLEIN_PROT" in capsys.readouterr().err
    assert not dummy


PROGRAM = """
import contextlib, io, sys
from app.cli.main import main
for words in ("--version", "--help", "download --help"):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words.split())
    print(*sys.modules)
"""


def test_help_imports_what_it_needs() -> None:
    """No command but the one that is asked for, and nothing heavy: it answers at once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )

    version, every, one = (set(line.split()) for line in done.stdout.splitlines())
    commands = {command.module for command in COMMANDS.values()}
    assert not every & {"torch", "diffusers", "transformers", "fastapi", "tqdm", "psutil"}
    assert not one & {"torch", "diffusers", "transformers", "fastapi"}
    assert [modules & commands for modules in (version, every, one)] == [
        set(),
        set(),
        {COMMANDS["download"].module},
    ]
