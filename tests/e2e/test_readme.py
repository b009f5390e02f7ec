"""The README's commands do what it says they do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.server import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.torch]

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
]
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")} | {
    "KLEIN_DEVICE": "cpu",
    "KLEIN_MODEL": "shapes",
    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # noqa: PTH120
}


def run(command, cwd, timeout_s=120):
    """Run one line of the README."""
    return subprocess.run(
        shlex.split(command), cwd=cwd, env=ENVIRON, capture_output=True, timeout=timeout_s
    )


def test_every_command_is_of_a_kind_that_is_tested():
    """A command that nobody runs cannot stand there; downloads and containers have tests of their
    own.
    """
    known = ("make ", "curl ", "klein ", "docker compose ")

    assert [line for line in COMMANDS if not line.startswith(known)] == []


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_the_two_commands_are_targets(command):
    """`make` knows them."""
    assert run(f"{command} --dry-run", ROOT).returncode == 0


def test_the_first_request_gives_a_png(shapes, tmp_path):
    """The curl line, as it stands but for the port."""
    (command,) = [line for line in COMMANDS if line.startswith("curl ")]
    done = run(command.replace("localhost:8000", shapes.url.removeprefix("http://")), tmp_path)

    assert done.returncode == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_python_example_runs(shapes, tmp_path):
    """The openai client's example, as it stands but for the port."""
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    script = tmp_path / "example.py"
    script.write_text(code.replace("http://127.0.0.1:8000", shapes.url))
    done = run(f"{sys.executable} {script}", tmp_path)

    assert done.stdout.startswith(b"256x256 [")


@pytest.mark.parametrize(
    "start",
    [
        "klein --version",
        pytest.param("klein generate", marks=pytest.mark.full),
        pytest.param("klein doctor --card", marks=pytest.mark.full),
        pytest.param("klein compare", marks=pytest.mark.full),
    ],
)
def test_commands_without_a_card(start, tmp_path):
    """Each runs here as it stands there."""
    (command,) = [line for line in COMMANDS if line.startswith(start)]
    done = run(command, tmp_path)

    assert done.returncode == 0, done.stderr.decode()
