"""Pictures of adapters: small, made once, and by a decoder's process from any bytes."""

from __future__ import annotations

import asyncio
import io
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from app.images.pool import DecoderPool
from app.service import previews as module
from app.service.previews import Previews
from tests.service.test_adapters import adapter
from tests.support.fakes import FakeDecoders


class Decoders(FakeDecoders):
    """Counts, and has at most one at work."""

    calls = 0
    at_work = 0

    async def prepare(self, *given, **more):
        self.calls += 1
        self.at_work += 1
        assert self.at_work == 1
        await asyncio.sleep(0)
        self.at_work -= 1
        return await super().prepare(*given, **more)


@pytest.fixture
def decoders() -> Decoders:
    """Those of `previews`."""
    return Decoders()


@pytest.fixture
def style(tmp_path):
    """An adapter in tmp_path."""
    return replace(adapter("style"), path=str(tmp_path / "style.safetensors"))


def paint(path: Path, size: tuple[int, int] = (1000, 500), colour: str = "red") -> None:
    """Save a picture of one colour."""
    Image.new("RGB", size, colour).save(path)


async def test_a_preview_is_small_and_made_once(decoders, style, tmp_path) -> None:
    """However many ask at a time; anew once the file has changed."""
    paint(tmp_path / "style.preview.png")
    previews = Previews(decoders)
    answers = await asyncio.gather(*(previews.get(style, "a") for _ in range(10)))

    assert decoders.calls == 1
    assert len(set(answers)) == 1
    with Image.open(io.BytesIO(answers[0])) as picture:
        assert (picture.format, picture.width) == ("WEBP", 384)
        assert 180 < picture.height < 200

    paint(tmp_path / "style.preview.png", (128, 128), "blue")
    changed = await previews.get(style, "a")
    assert decoders.calls == 2
    with Image.open(io.BytesIO(changed)) as picture:
        assert picture.size == (128, 128)


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n" + b"x" * 100])
async def test_what_is_no_picture_is_none_and_tried_once(decoders, style, tmp_path, data) -> None:
    """A hostile file costs one decoder, however often it is asked for."""
    (tmp_path / "style.png").write_bytes(data)
    previews = Previews(decoders)

    assert [await previews.get(style, "a") for _ in range(3)] == [None] * 3
    assert decoders.calls <= 1


async def test_no_picture_pipes_and_large_files_are_none(
    decoders, style, tmp_path, monkeypatch
) -> None:
    """None of them is given to a decoder."""
    previews = Previews(decoders)
    assert await previews.get(style, "a") is None
    os.mkfifo(tmp_path / "style.png")
    assert await previews.get(style, "a") is None
    paint(tmp_path / "style.jpg")
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    assert await previews.get(style, "a") is None

    assert decoders.calls == 0


async def test_previews_that_are_kept_have_a_number(decoders, style, tmp_path, monkeypatch) -> None:
    """The last ones."""
    monkeypatch.setattr(module, "_KEPT", 1)
    previews = Previews(decoders)
    for colour in ("red", "blue"):
        paint(tmp_path / "style.png", colour=colour)
        os.utime(tmp_path / "style.png", (time.time(), len(colour)))
        await previews.get(style, "a")

    assert len(previews._kept) == 1


async def test_a_process_decodes(style, tmp_path) -> None:
    """The service's own pool."""
    paint(tmp_path / "style.png", (640, 640))
    pool = DecoderPool(size=1)
    try:
        assert await Previews(pool).get(style, "a")
    finally:
        pool.kill()
