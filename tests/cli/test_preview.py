"""Which terminals show pictures, and what is written to them."""

from __future__ import annotations

import base64
import fcntl
import io
import os
import re
import select
import struct
import sys
import termios
import threading

import numpy as np
import pytest
from PIL import Image

from app.cli import preview
from app.cli.console import Progress
from app.cli.drawing import Display, Drawn, Preview, Step
from app.cli.preview import PROTOCOLS, Previews, find_previews, find_protocol

RED, BLUE = (220, 30, 30), (30, 30, 220)


def picture(format: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    """A file, red on the left and blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("environ", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color"}, "sixel"),
        ({"TERM": "tmux-256color", "TMUX": "a", "KITTY_WINDOW_ID": "1"}, "sixel"),
        ({"TERM": "screen", "STY": "a", "TERM_PROGRAM": "iTerm.app"}, "sixel"),
        ({"TERM": "linux"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({}, None),
    ],
)
def test_the_environment_tells_the_protocol(monkeypatch, environ, protocol) -> None:
    """Inside tmux and screen it tells of the terminal around, which is not the one written to."""
    monkeypatch.setattr(preview, "_attributes", lambda: {1, 4})
    assert find_protocol(environ) == protocol


def test_a_terminal_without_sixel_shows_no_pictures(monkeypatch) -> None:
    """As its own answer says."""
    monkeypatch.setattr(preview, "_attributes", lambda: {1, 2})
    assert find_protocol({"TERM": "xterm"}) is None


@pytest.mark.parametrize(
    ("answer", "found"),
    [(b"\x1b[?62;4;22c", {62, 4, 22}), (b"typed\x1b[?1;2c", {1, 2}), (b"", set())],
)
def test_a_terminal_is_asked_for_its_attributes(monkeypatch, answer, found) -> None:
    """One that is silent is not waited for long, and it gets its settings back."""
    monkeypatch.setattr(preview, "_ASK_S", 0.5 if answer else 0.02)
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)

    def reply() -> None:
        if select.select([ours], [], [], 5)[0] and os.read(ours, 64) == b"\x1b[c":
            os.write(ours, answer)

    terminal = threading.Thread(target=reply)
    terminal.start()
    assert preview._ask(theirs) == found
    terminal.join()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_kitty_gets_a_png_in_pieces(format) -> None:
    """Each of at most 4,096 characters, the last one marked."""
    file = picture(format, (640, 640))
    if format == "PNG":
        file += bytes(9000)  # behind the end of the picture
    written = PROTOCOLS["kitty"](file, 12)

    pieces = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", written)
    assert "".join(f"\x1b_G{head};{text}\x1b\\" for head, text in pieces) == written
    assert all(len(text) <= 4096 for _, text in pieces)
    assert pieces[0][0].startswith("a=T,f=100,q=2,C=1,r=12,m=")
    assert [head[-3:] for head, _ in pieces] == ["m=1"] * (len(pieces) - 1) + ["m=0"]
    data = base64.b64decode("".join(text for _, text in pieces))
    assert Image.open(io.BytesIO(data)).format == "PNG"


def test_iterm2_gets_the_file() -> None:
    """As it is, with its height in rows."""
    file = picture("WEBP")
    head, _, text = PROTOCOLS["iterm2"](file, 12).partition(":")

    assert head.startswith("\x1b]1337;File=inline=1;")
    assert "height=12;" in head
    assert base64.b64decode(text.removesuffix("\a")) == file


def read_sixel(text: str) -> np.ndarray:
    """Height x width x 3 of what is drawn, in percent."""
    width, height = map(int, re.search(r'"1;1;(\d+);(\d+)', text).groups())
    colours = {
        int(index): [int(red), int(green), int(blue)]
        for index, red, green, blue in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)
    }
    drawn = np.zeros((height, width, 3))
    body = re.sub(r"#\d+;2;\d+;\d+;\d+", "", text.partition(f";{height}")[2]).removesuffix("\x1b\\")
    for top, band in enumerate(body.split("-")[:-1]):
        for colour, line in re.findall(r"#(\d+)([^#$]*)\$", band):
            line = re.sub(r"!(\d+)(.)", lambda found: found[2] * int(found[1]), line)
            for x, letter in enumerate(line):
                for bit in range(6):
                    if (ord(letter) - 63) >> bit & 1:
                        drawn[top * 6 + bit, x] = colours[int(colour)]
    return drawn


def test_sixel_draws_the_picture() -> None:
    """Its colours, its ratio of sides, and no more rows than there is room for."""
    drawn = read_sixel(PROTOCOLS["sixel"](picture(size=(128, 64)), 4))

    assert drawn.shape[0] <= 4 * 18
    assert drawn.shape[1] == 2 * drawn.shape[0]
    assert np.abs(drawn[5, 5] * 2.55 - RED).max() < 6
    assert np.abs(drawn[-5, -5] * 2.55 - BLUE).max() < 6


class Terminal(io.StringIO):
    """Standard error as a terminal of a size."""

    def isatty(self) -> bool:
        return True


def test_a_picture_takes_the_place_of_the_last_one(monkeypatch) -> None:
    """Rows are made once, and again after a finished one, which stands."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    previews = Previews(lambda data, rows: f"<{data.decode()}>", 5)
    for data in (b"one", b"two"):
        previews.show(data)
    assert sys.stderr.getvalue().count("\n" * 5) == 1
    previews.leave()
    previews.show(b"three")

    written = sys.stderr.getvalue()
    assert written.count("\n" * 5) == 2
    assert re.findall(r"\x1b\[5A\r\x1b7<(\w+)>\x1b8\x1b\[5B", written) == ["one", "two", "three"]


def test_what_cannot_be_read_is_not_drawn(monkeypatch) -> None:
    """A preview that a service sends is checked as any upload is."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    Previews(PROTOCOLS["sixel"], 5).show(b"no picture")

    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("rows", "are_shown"), [(24, True), (6, False)])
def test_a_low_terminal_shows_none(monkeypatch, rows, are_shown) -> None:
    """There must be room for the picture, and the line below it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 800, rows * 20))
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb"):
        monkeypatch.setattr(sys, "stderr", terminal)
        assert (find_previews("kitty", {"TERM": "xterm"}) is not None) == are_shown
        assert find_previews("none", {"TERM": "xterm-kitty"}) is None


def test_the_first_picture_that_is_not_done_is_shown(monkeypatch) -> None:
    """The line tells of all; finished ones are shown as they come."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    display = Display(2, Progress(), Previews(lambda data, rows: f"<{data.decode()}>", 5))
    display.on(0, Step("denoise 2/4", 0.5))
    display.on(0, Preview(b"first"))
    display.on(1, Preview(b"second"))
    display.on(0, Drawn(b"whole", 1, 1, 1, {}))
    display.on(1, Preview(b"second again"))

    written = sys.stderr.getvalue()
    assert re.findall(r"<([\w ]+)>", written) == ["first", "whole", "second again"]
    assert " 25% |" in written
    assert "0 of 2, denoise 2/4" in written
    assert "1 of 2" in written
