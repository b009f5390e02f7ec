"""Decoding in tiles: where they lie, and that the picture is that of the whole decode."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from app.engine.pipeline import decode as decode_stage
from app.engine.pipeline import tiled_decode
from tests.support.layout_files import build

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def components(tiny_klein):
    return build(tiny_klein)


def latents(height: int, width: int, channels: int = 8) -> torch.Tensor:
    """Smooth noise: real latents change slowly over a picture."""
    generator = torch.Generator().manual_seed(3)
    small = torch.randn(1, channels, max(2, height // 8), max(2, width // 8), generator=generator)
    return functional.interpolate(small, size=(height, width), mode="bilinear")


@pytest.mark.parametrize("longest", [72, 104])
@pytest.mark.parametrize("length", [1, 8, 71, 72, 73, 96, 128, 129, 192, 250, 256, 512])
def test_tiles_cover_a_side_and_overlap_enough(length, longest):
    """From 0 to the end without a gap, none beyond it."""
    tile, found = tiled_decode.starts(length, longest)

    assert found[0] == 0
    assert found[-1] + tile == length
    for one, other in itertools.pairwise(found):
        assert 0 < other - one <= tile - tiled_decode.OVERLAP


def test_tiles_are_few_and_then_small():
    """1024x1024 is 128 latents a side, two tiles each way; larger ones need no whole tiles."""
    assert tiled_decode.starts(128) == (72, [0, 56])
    assert tiled_decode.starts(256, 104) == (96, [0, 80, 160])


@pytest.mark.parametrize(("height", "width"), [(96, 80), (40, 130), (72, 72), (24, 16)])
def test_a_local_decoder_is_joined_exactly(height, width):
    """Where a pixel hangs on its own latent alone, the mixed overlaps are the whole."""

    def decode(each: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(each[:, :3], scale_factor=8.0)

    plane = latents(height, width)
    assert torch.allclose(tiled_decode.decode_tiled(decode, plane, 8), decode(plane), atol=1e-5)


@torch.no_grad()
def test_the_tiled_picture_is_the_whole_one(components):
    """The VAE sees the whole through its norms and its attention, so the pixels differ a little,
    and nowhere by an edge.
    """
    plane = latents(40, 96)
    whole = components.decode(plane)
    tiled = tiled_decode.decode_tiled(components.decode, plane, 8)

    assert tiled.shape == whole.shape == (1, 3, 320, 768)
    error = (tiled - whole).abs()
    assert float(error.mean()) < 0.2 * float(whole.std())


@torch.no_grad()
def test_a_decode_without_room_is_done_in_tiles_once(components, monkeypatch, caplog):
    """The whole decode fails for memory; the tiles take its place, and the log says so."""
    calls = []

    def decode(each):
        calls.append(each.shape)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return functional.interpolate(each[:, :3], scale_factor=8.0)

    monkeypatch.setattr(components, "decode", decode)
    made = decode_stage.decode(components, torch.randn(1, 6 * 4, 32), (6, 4))

    assert made.shape == (1, 3, 96, 64)
    assert len(calls) == 2
    assert "in tiles" in caplog.text


@torch.no_grad()
def test_a_second_failure_is_the_jobs(components, monkeypatch):
    """If not even tiles fit, the error goes to the caller."""

    def decode(_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(components, "decode", decode)
    with pytest.raises(torch.OutOfMemoryError):
        decode_stage.decode(components, torch.randn(1, 6 * 4, 32), (6, 4))


@torch.no_grad()
@pytest.mark.parametrize(
    ("is_tiled", "shape", "longest"),
    [(True, (5, 5), 72), (True, (81, 64), 72), (False, (81, 64), 104)],
)
def test_tiles_are_taken_by_plan_or_by_size(components, monkeypatch, is_tiled, shape, longest):
    """A tiled plan tiles always; any plan tiles over 1.3 megapixels, with larger tiles."""
    taken = []
    monkeypatch.setattr(
        decode_stage,
        "decode_tiled",
        lambda _, each, scale, side=72: taken.append(side) or each,
    )
    monkeypatch.setattr(components, "is_tiled", is_tiled)
    decode_stage.decode(components, torch.zeros(1, shape[0] * shape[1], 32), shape)

    assert taken == [longest]


@torch.no_grad()
def test_where_large_tiles_find_no_room_small_ones_are_taken(components, monkeypatch):
    """The picture is made once more, as under a plan that tiles."""
    sides = []

    def decode(each):
        sides.append(each.shape[2:])
        if len(sides) == 1:
            raise torch.OutOfMemoryError("no room")
        return functional.interpolate(each[:, :3], scale_factor=8.0)

    monkeypatch.setattr(components, "decode", decode)
    made = decode_stage.decode(components, torch.randn(1, 128 * 48, 32), (128, 48))

    assert made.shape == (1, 3, 2048, 768)
    assert sides[:2] == [(96, 96), (72, 72)]
