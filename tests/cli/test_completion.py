"""What shells complete is what the parsers take."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from app.cli.completion import SHELLS, describe
from app.cli.main import COMMANDS, main


def bash(tmp_path, *words: str) -> list[str]:
    """What bash offers for the last of *words*."""
    script = tmp_path / "klein.bash"
    script.write_text(SHELLS["bash"](describe()))
    line = (
        f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        'compopt() { :; }; _klein; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["klein", "can"], ["cancel"]),
        (["klein", "gener"], ["generate"]),
        (["klein", "generate", "--form"], ["--format"]),
        (["klein", "generate", "--format", ""], ["png", "jpeg", "webp"]),
        (["klein", "generate", "a cat", "--seed", ""], []),
        (["klein", "generate", "--image", "pict"], ["picture.png"]),
        (["klein", "cache", ""], ["list", "prune"]),
        (["klein", "queue", "--j"], ["--json"]),
    ],
)
def test_bash_offers_what_fits(tmp_path, words, offered) -> None:
    """Commands, options, their values, and files only where a path is meant."""
    (tmp_path / "picture.png").touch()

    assert bash(tmp_path, *words) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_names_every_command_and_option(shell, capsys) -> None:
    """And none that is hidden, such as the refused key."""
    assert main(["completion", shell, "--json"]) == 0
    script = json.loads(capsys.readouterr().out)["script"]

    assert all(name in script for name in COMMANDS)
    assert "overwrite" in script
    assert "env-file" in script
    assert "api-key" not in script


@pytest.mark.system
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("klein can", {"cancel"}),
        ("klein generate --form", {"--format"}),
        ("klein generate --format ", {"png", "jpeg", "webp"}),
    ],
)
def test_fish_offers_what_fits(tmp_path, line, offered) -> None:
    """Its own completion, asked as the key Tab asks it."""
    script = tmp_path / "klein.fish"
    script.write_text(SHELLS["fish"](describe()))
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; complete -C {shlex.quote(line)}"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    assert {each.split("\t")[0] for each in done.stdout.splitlines()} == offered
