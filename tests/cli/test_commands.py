"""A command is one entry of the registry; `klein` knows nothing else of it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import ModuleType

import pytest

from app.cli.completion import describe
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
for words in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        sys.stderr = io.StringIO()
        main(words.split())
    print(*sys.modules)
"""


def test_help_imports_what_it_needs() -> None:
    """No command but the one that is asked for, and nothing heavy: it answers at once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--version", "--help", "download --help"],
        capture_output=True,
        text=True,
        check=True,
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


def test_what_asks_a_service_imports_little() -> None:
    """Neither settings nor their library, nor anything of the service; and no model, of course."""
    commands = ("queue", "cancel --all", "models", "loras", "generate a -o x.png")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(f"{words} --url 127.0.0.1:1" for words in commands)],
        capture_output=True,
        text=True,
        check=True,
    )

    modules = set(done.stdout.splitlines()[-1].split())
    heavy = {"torch", "fastapi", "pydantic", "numpy", "huggingface_hub", "asyncio"}
    assert "app.cli.client.service" in modules
    assert not modules & (heavy | {"app.settings", "app.engine", "app.api", "app.runtime"})


def test_unknown_options_print_their_commands_usage(dummy, capsys) -> None:
    """Not that of `klein`, which knows nothing of them; the exit code is 2."""
    for words in (["dummy", "--fial"], ["dummy", "--fail", "more"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("usage: klein dummy ")
        assert f"unrecognized arguments: {words[-1]}" in said


@pytest.mark.parametrize("option", ["--api-key", "--api-keys", "--key"])
@pytest.mark.parametrize("command", ["dummy", "serve", "generate"])
def test_a_key_on_the_command_line_is_refused(dummy, capsys, command, option) -> None:
    """With the place where it belongs, and without the key."""
    for words in ([option, "first-key-1234"], [f"{option}=first-key-1234"], [option]):
        with pytest.raises(SystemExit) as ended:
            main([command, *words])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert "put it into a file" in said
        assert "first-key" not in said
    with pytest.raises(SystemExit):
        main([option, "first-key-1234", command])
    assert "first-key" not in capsys.readouterr().err
    assert not dummy


def test_a_file_of_variables_is_read_where_it_is_named(dummy, monkeypatch, tmp_path) -> None:
    """What is set wins over it; quotes, comments and `export` are taken off."""
    lines = ["# mine", "", "KLEIN_PORT=8123 # a port", "export KLEIN_MODEL='shapes'", "OTHER=x"]
    (tmp_path / ".env").write_text("\n".join([*lines, 'KLEIN_HOST="::1"', "KLEIN_URL=a"]))
    environ = {**os.environ, "KLEIN_MODEL": "flux.2-klein-4b"}
    monkeypatch.setattr(os, "environ", environ)

    assert main(["dummy", "--env-file", str(tmp_path / ".env")]) == 7
    assert main(["dummy", f"--env-file={tmp_path / '.env'}"]) == 7
    for _, settings in dummy:
        assert (settings.port, settings.host) == (8123, "::1")
        assert settings.model == "flux.2-klein-4b"
    assert environ["OTHER"] == "x"


@pytest.mark.parametrize("content", [None, "no variable", "A B=1", b"\xff=1"])
def test_a_file_of_variables_that_is_none_is_one_sentence(dummy, tmp_path, capsys, content) -> None:
    """Its content is not repeated, since it may be a key."""
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / ".env").write_bytes(data)

    assert main(["dummy", "--env-file", str(tmp_path / ".env")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "A B" not in said
    assert not dummy


def test_the_clients_variables_are_unknown_to_serve_alone(dummy, monkeypatch, capsys) -> None:
    """Whoever has them in the shell can use every other command."""
    monkeypatch.setenv("KLEIN_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("KLEIN_KEY_FILE", "keys")

    assert main(["dummy"]) == 7
    assert main(["serve"]) == 1
    assert "is not a setting of this service" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_settings_that_a_command_overrides_are_its_options(name) -> None:
    """And `--json` is an option of each."""
    (described,) = [each for each in describe() if each.name == name]
    names = {option for word in described.options for option in word.names}

    assert {f"--{each.replace('_', '-')}" for each in COMMANDS[name].settings or ()} <= names
    assert "--json" in names
