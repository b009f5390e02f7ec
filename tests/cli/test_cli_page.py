"""The page of the command line says what the parsers say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from app.cli.completion import describe
from app.cli.main import COMMANDS, EXIT_CODES

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    """docs/cli.md is what tools/cli_page.py writes now; if not, run it."""
    tool = runpy.run_path(str(ROOT / "tools" / "cli_page.py"))

    assert tool["PAGE"].read_text() == tool["page"]()


def test_every_command_option_and_exit_code_is_on_the_page() -> None:
    """Each command has a part of its own."""
    page = (ROOT / "docs" / "cli.md").read_text()

    assert [line[9:] for line in page.splitlines() if line.startswith("## klein ")] == [*COMMANDS]
    for command in describe():
        assert all(f"`{name}`" in page for word in command.words for name in word.names)
    assert all(f"| {code} | " in page for code in EXIT_CODES)


@pytest.mark.parametrize("command", describe(), ids=lambda command: command.name)
def test_every_option_says_what_it_does(command) -> None:
    """In `--help`, on the page and in completions."""
    assert not [word for word in command.words if not word.help]
