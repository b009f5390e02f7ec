"""The decoder is made ready while the other weights are read."""

from __future__ import annotations

import pytest
import torch

from app.engine import catalog, compiling
from app.engine.ahead import decoding, default_size, other_sizes
from app.engine.compiling import Compiler
from app.engine.stages import decode
from app.engine.tiles import TILE
from tests.checkpoints import write_tiny_klein
from tests.engine.layout_files import build

pytestmark = pytest.mark.torch

SIZES = ((128, 192), (64, 128))
PLACE = {"channels": 4, "device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_klein(tmp_path_factory.mktemp("tiny") / "model")


@torch.no_grad()
@pytest.mark.parametrize("is_tiled", [False, True])
def test_no_picture_waits_for_the_decoders_compiler(folder, is_tiled):
    """After the build both pieces of code are there: for the first size and for all others."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    torch.compiler.reset()
    try:
        compiler = Compiler(is_on=True, has_graphs=False, reason="a test", backend=backend)
        parts = build(folder, compiler=compiler, ahead=SIZES, is_tiled=is_tiled)
        count = len(compiled)
        channels = parts.transformer.config.in_channels
        for width, height in (*SIZES, (128, 64)):
            shape = (height // 16, width // 16)
            decode(parts, torch.zeros(1, shape[0] * shape[1], channels), shape)
    finally:
        compiling.thaw()
        torch.compiler.reset()

    assert count >= 2
    assert len(compiled) == count


def test_sizes_are_latents_and_tiles_no_larger_than_tiles():
    """In this order; the block's own end comes after the last."""
    seen = []

    def note(latents):
        seen.append(tuple(latents.shape))
        return latents

    with decoding(note, ((1024, 512), (64, 128)), **PLACE, is_tiled=False):
        pass
    with decoding(note, ((1024, 512),), **PLACE, is_tiled=True):
        pass

    assert seen == [(1, 4, 64, 128), (1, 4, 16, 8), (1, 4, 64, TILE)]


def test_what_fails_ahead_is_left_to_the_warm_up():
    """A decoder that finds no room beside the reading does not end the start."""
    calls = []

    def fail(latents):
        calls.append(latents.shape)
        raise torch.OutOfMemoryError

    with decoding(fail, SIZES, **PLACE, is_tiled=False):
        pass

    assert len(calls) == 1


def test_no_two_sides_of_a_warm_up_picture_are_alike():
    """The compiler takes equal numbers for the same unknown, also where it saw the default size."""
    card = catalog.card("flux.2-klein-4b")
    size = default_size(card)

    assert size == (1024, 1024)
    assert all(len({*size, *other}) == 3 for other in other_sizes(size))
