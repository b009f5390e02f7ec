"""Pictures in terminals: kitty's and iTerm2's protocols, and sixel.

Which one a terminal knows is told by its environment, and sixel by its answer to the question for
its attributes (DA1). Inside tmux or screen only that answer counts: the environment tells of the
terminal around it.
"""

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
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from app.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

AUTO, NONE = "auto", "none"
_ROWS = 14
_FEWEST_ROWS = 4
_SPARE_ROWS = 3
"""Rows that a picture leaves to what stands below it."""
_CELL_PIXELS = 18
"""The height of a letter where the terminal does not tell it."""
_ASK_S = 0.3
_CHUNK = 4096
"""Most that kitty takes at a time."""
_PNG = b"\x89PNG"
_SIXEL_COLOURS = 128
_REPEATED = re.compile(r"(.)\1{3,}")
_SIXEL = 4
"""Among the attributes of a terminal: it shows sixel."""


class Previews:
    """Draws one picture over the last one, above the line that the cursor is in."""

    def __init__(self, draw: Callable[[bytes, int], str], rows: int) -> None:
        self._draw = draw
        self._rows = rows
        self._is_placed = False

    def show(self, data: bytes) -> None:
        """Draw the file *data*; nothing where it cannot be read."""
        try:
            picture = self._draw(data, self._rows)
        except InvalidRequest:
            return
        room = "" if self._is_placed else "\n" * self._rows
        self._is_placed = True
        # The cursor comes back by itself: terminals differ in where a picture leaves it.
        sys.stderr.write(f"{room}\x1b[{self._rows}A\r\x1b7{picture}\x1b8\x1b[{self._rows}B\r")
        sys.stderr.flush()

    def leave(self) -> None:
        """Let the picture stand; the next one gets a place of its own."""
        self._is_placed = False


def find_previews(wanted: str, environ: Mapping[str, str]) -> Previews | None:
    """Return what draws on the terminal of standard error; None where it shows no pictures."""
    if wanted == NONE or sys.stderr is None or not sys.stderr.isatty():
        return None
    protocol = wanted if wanted != AUTO else find_protocol(environ)
    rows = min(_ROWS, _size()[0] - _SPARE_ROWS)
    if protocol is None or rows < _FEWEST_ROWS:
        return None
    return Previews(PROTOCOLS[protocol], rows)


def find_protocol(environ: Mapping[str, str]) -> str | None:
    """Return the protocol that the terminal knows."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if term in {"", "dumb", "linux"}:
        return None
    if not any(name in environ for name in ("TMUX", "STY")):
        if "KITTY_WINDOW_ID" in environ or term in {"xterm-kitty", "xterm-ghostty"}:
            return "kitty"
        is_iterm = environ.get("LC_TERMINAL") == "iTerm2"
        if is_iterm or program in {"iTerm.app", "WezTerm", "mintty"}:
            return "iterm2"
    return "sixel" if _SIXEL in _attributes() else None


def _attributes() -> set[int]:
    """Ask the terminal for its attributes; none where it is silent, or not in the foreground."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        # In the background the question would stop this process.
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return set()
        return _ask(terminal)
    except (OSError, termios.error):
        return set()
    finally:
        os.close(terminal)


def _ask(terminal: int) -> set[int]:
    before, answer, end = termios.tcgetattr(terminal), b"", time.monotonic() + _ASK_S
    try:
        tty.setcbreak(terminal)
        os.write(terminal, b"\x1b[c")
        while not answer.endswith(b"c") and (left := end - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                answer += os.read(terminal, 1024)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    found = answer.rpartition(b"\x1b[?")[2].removesuffix(b"c").split(b";")
    return {int(each) for each in found if each.isdigit()}


def _size() -> tuple[int, int]:
    """Return the terminal's rows, and the pixels of one row."""
    with suppress(OSError):
        raw = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        rows, _, _, pixels = struct.unpack("HHHH", raw)
        if rows:
            return rows, pixels // rows or _CELL_PIXELS
    return 24, _CELL_PIXELS


def _draw_kitty(data: bytes, rows: int) -> str:
    if not data.startswith(_PNG):
        file = io.BytesIO()
        _open(data).save(file, "PNG", compress_level=1)
        data = file.getvalue()
    text = base64.b64encode(data).decode()
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    head = f"a=T,f=100,q=2,C=1,r={rows},"
    drawn = [
        f"\x1b_G{'' if index else head}m={int(index + 1 < len(chunks))};{chunk}\x1b\\"
        for index, chunk in enumerate(chunks)
    ]
    return "".join(drawn)


def _draw_iterm2(data: bytes, rows: int) -> str:
    text = base64.b64encode(data).decode()
    head = f"inline=1;size={len(data)};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={head}:{text}\a"


def _draw_sixel(data: bytes, rows: int) -> str:
    import numpy as np

    picture = _open(data)
    height = rows * _size()[1] // 6 * 6
    width = max(1, round(picture.width * height / picture.height))
    indexed = picture.resize((width, height)).quantize(_SIXEL_COLOURS)
    palette = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3) * (100 / 255)
    colours = "".join(
        f"#{index};2;{red:.0f};{green:.0f};{blue:.0f}"
        for index, (red, green, blue) in enumerate(palette)
    )
    pixels = np.asarray(indexed)

    def bands() -> Iterator[str]:
        weights = (1 << np.arange(6, dtype=np.uint8))[:, None]
        for top in range(0, height, 6):
            band = pixels[top : top + 6]
            for colour in np.unique(band):
                bits = ((band == colour) * weights).sum(axis=0, dtype=np.uint8) + 63
                line = bits.tobytes().decode()
                yield f"#{colour}{_REPEATED.sub(_shorten, line)}$"
            yield "-"

    return f'\x1bP0;1;0q"1;1;{width};{height}{colours}{"".join(bands())}\x1b\\'


def _shorten(found: re.Match[str]) -> str:
    return f"!{len(found[0])}{found[1]}"


def _open(data: bytes) -> Image.Image:
    """Decode a file within the limits for those that others send.

    Raises:
        InvalidRequest: it is no picture.
    """
    from app.images.uploads import decode_upload, to_pillow

    return to_pillow(decode_upload(data, what="picture"))


PROTOCOLS: dict[str, Callable[[bytes, int], str]] = {
    "kitty": _draw_kitty,
    "iterm2": _draw_iterm2,
    "sixel": _draw_sixel,
}
"""What is written to a terminal to show a file so many rows high, by the protocol's name."""
