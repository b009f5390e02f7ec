"""The command line as somebody sits before it: a terminal, a shell, and the demo's service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.torch]

PROMPT = "ready>"


class Tmux:
    """One terminal of 100 columns, with a shell in *folder*."""

    def __init__(self, folder: Path, shell: str, **environ: str) -> None:
        self._socket = str(folder / "tmux.socket")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "TMUX"))}
        kept |= {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **environ}
        self._environ = kept | {"LC_ALL": "C.UTF-8", "ZDOTDIR": str(folder), "HOME": str(folder)}
        self._run("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", shell, at=folder)
        self._is_fish = shell.startswith("fish")

    def __enter__(self) -> Tmux:
        try:
            self._take_prompt()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _take_prompt(self) -> None:
        self.wait(lambda screen: bool(screen.strip()))
        prompt = "function fish_prompt; echo ready'>'; end" if self._is_fish else "PS1='ready''>'"
        self.type(prompt)
        self.press("Enter")
        self.wait(lambda screen: PROMPT in screen)

    def __exit__(self, *error: object) -> None:
        self._run("kill-server")

    def _run(self, *words: str, at: Path | None = None) -> str:
        return subprocess.run(
            ["tmux", "-S", self._socket, *words],
            env=self._environ,
            cwd=at,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def type(self, text: str) -> None:
        """Type *text* as it is."""
        self._run("send-keys", "-l", "--", text)

    def press(self, *keys: str) -> None:
        """Press keys by their names, such as Enter and C-c."""
        self._run("send-keys", *keys)

    @property
    def screen(self) -> str:
        """What stands there now."""
        return self._run("capture-pane", "-p", "-J")

    def wait(self, is_there: Callable[[str], bool], seconds: float = 30) -> str:
        """Wait until the screen is as it should be."""
        deadline = time.monotonic() + seconds
        while not is_there(screen := self.screen):
            assert time.monotonic() < deadline, screen
            time.sleep(0.02)
        return screen

    def ask(self, command: str) -> str:
        """Run *command* on an empty screen, and return what stands there at its end."""
        self.start(command)
        return self.wait(lambda screen: "exit code " in screen).partition("exit code")[0]

    def start(self, command: str) -> None:
        """Begin with *command*; at its end its exit code is printed."""
        self._run("send-keys", "-R")
        self._run("clear-history")
        self.type(f"clear; {command}; echo exit 'code' $?")
        self.press("Enter")
        # The typed line itself is gone by then.
        self.wait(lambda screen: "echo exit" not in screen)


@pytest.fixture(scope="module")
def service():
    """The demo, as everybody has it without a card."""
    with Server(model="shapes", device="cpu") as server:
        yield server


@pytest.fixture
def terminal(service, tmp_path):
    """A shell beside it."""
    with Tmux(tmp_path, "bash --norc --noprofile", KLEIN_URL=service.url) as running:
        yield running


def jobs(service) -> list[dict[str, object]]:
    """What waits or runs."""
    return json.loads(service.get("/v1/jobs")[2])["data"]


def asking() -> list[psutil.Process]:
    """The processes of `klein generate`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "generate" in words and any(word.endswith("/klein") for word in words):
            found.append(process)
    return found


def test_three_pictures_and_one_in_a_pipe(terminal, service, tmp_path) -> None:
    """n=3 into a folder; a taken name; standard output, which is not for the terminal itself."""
    (tmp_path / "made").mkdir()
    said = terminal.ask("klein generate 'a red circle' -n 3 --seed 1 -o made/")

    assert all(f"made/klein-{seed}.png: 256x256, seed {seed}" in said for seed in (1, 2, 3))
    assert "\x1b" not in said
    assert "%" not in said
    assert len([*(tmp_path / "made").iterdir()]) == 3
    before = (tmp_path / "made" / "klein-1.png").read_bytes()
    assert "is there already" in terminal.ask("klein generate 'a cat' --seed 1 -o made")
    assert (tmp_path / "made" / "klein-1.png").read_bytes() == before
    terminal.ask("klein generate 'a red circle' --seed 1 -o - > piped.png")
    assert (tmp_path / "piped.png").read_bytes() == before
    assert "to the terminal" in terminal.ask("klein generate 'a red circle' -o -")


def test_an_edit_with_a_mask(terminal, tmp_path) -> None:
    """What the mask keeps is kept."""
    terminal.ask("klein generate 'a red circle on a blue background' --seed 1 -o a.png")
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (0, 0, 256, 128))
    mask.save(tmp_path / "mask.png")
    said = terminal.ask("klein generate 'a green circle' --image a.png --mask mask.png -o b.png")

    assert "b.png: 256x256" in said
    with Image.open(tmp_path / "a.png") as before, Image.open(tmp_path / "b.png") as after:
        below = (0, 160, 256, 256)
        assert before.crop(below).tobytes() == after.crop(below).tobytes()
        assert before.tobytes() != after.tobytes()


def test_ctrl_c_and_cancel(terminal, service, tmp_path) -> None:
    """A line shows how far it is; both ways end the work; no second model is loaded meanwhile."""
    terminal.start("klein generate 'a red circle' -n 40 --steps 50 -o made.png")
    terminal.wait(lambda screen: "% |" in screen and "of 40, denoise" in screen)
    (process,) = asking()
    assert process.children() == []
    assert not [each for each in process.memory_maps() if "torch" in each.path]
    assert process.memory_info().rss < 150e6
    terminal.press("C-c")
    screen = terminal.wait(lambda screen: "exit code" in screen)
    assert "exit code 130" in screen
    assert "% |" not in screen
    terminal.wait(lambda screen: not jobs(service))

    terminal.start("klein generate 'a red circle' -n 40 --steps 50 -o other.png")
    terminal.wait(lambda screen: "of 40, denoise" in screen)
    for name in ("queue", "cancel"):
        done = subprocess.run(
            [Path(sys.executable).with_name("klein"), name, *["--all"][: name == "cancel"]],
            env={**os.environ, "KLEIN_URL": service.url},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()
    assert "exit code 1" in terminal.wait(lambda screen: "exit code" in screen)
    assert not jobs(service)


@pytest.mark.parametrize(
    ("shell", "first"),
    [
        ("bash --norc --noprofile", 'eval "$(klein completion bash)"'),
        ("zsh -f", 'autoload -U compinit; compinit -u; eval "$(klein completion zsh)"'),
        ("fish --no-config", "klein completion fish | source"),
    ],
)
def test_tab_completes(service, tmp_path, shell, first) -> None:
    """Commands, options and their values."""
    with Tmux(tmp_path, shell, KLEIN_URL=service.url) as terminal:
        terminal.type(f"{first}; clear")
        terminal.press("Enter")
        terminal.wait(lambda screen: "completion" not in screen and PROMPT in screen)
        for typed, whole in (
            ("klein gene", "klein generate "),
            ("--form", "klein generate --format "),
            ("we", "klein generate --format webp"),
        ):
            terminal.type(typed)
            terminal.press("Tab")
            terminal.wait(lambda screen, whole=whole: whole in screen)


def test_a_command_that_asks_answers_at_once(service) -> None:
    """In three tenths of a second, of which Python's own start is a part."""
    klein = Path(sys.executable).with_name("klein")
    took = []
    for _ in range(5):
        begun = time.monotonic()
        subprocess.run(
            [klein, "queue"],
            env={**os.environ, "KLEIN_URL": service.url},
            capture_output=True,
            check=True,
        )
        took.append(time.monotonic() - begun)

    assert min(took) < 0.3, took
