"""Compiling the decoder while the other networks are still being read.

The compiler's reading of the decoder takes as long as the weights of the transformer and the text
encoder, and needs the processor while they wait for the disk and the bus. The decoder's own weights
are read first, so its two pieces of code are made beside the reading: for the first warm-up picture
and for all other sizes. What fails here is tried again by the warm-up, which tells of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

import torch

from app.domain import ModelCard
from app.engine import faults
from app.engine.tiles import TILE

_log = logging.getLogger(__name__)

_SCALE = 8
"""Pixels to a latent, each way."""

Size = tuple[int, int]


def default_size(card: ModelCard, scale: int = 1) -> Size:
    """Width and height of the first warm-up picture, the model's own or a fraction of it."""
    return _side(card.default_width // scale), _side(card.default_height // scale)


def other_sizes(size: Size) -> tuple[Size, Size]:
    """Two sizes that stand for all others beside *size*.

    The sides of each differ from its own and from one another: the compiler takes equal numbers for
    the same unknown.
    """
    width, height = size
    return (
        (_side(width * 3 // 4), _side(height // 2)),
        (_side(width // 2), _side(height * 5 // 8)),
    )


@contextmanager
def decoding(
    decode: Callable[[torch.Tensor], torch.Tensor],
    sizes: Sequence[Size],
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    is_tiled: bool,
) -> Iterator[None]:
    """Decode pictures of *sizes*, in this order, in a thread beside the block; wait for its end."""
    most = TILE if is_tiled else max((max(size) for size in sizes), default=0)

    @torch.no_grad()
    def run() -> None:
        try:
            if device.type == "cuda":
                # Each thread has a card of its own that is meant where none is named.
                torch.cuda.set_device(device)
            for width, height in sizes:
                shape = (1, channels, min(most, height // _SCALE), min(most, width // _SCALE))
                decode(torch.zeros(shape, device=device, dtype=dtype))
        except Exception as error:
            _log.debug("The decoder was not compiled ahead.", exc_info=True)
            faults.release(error)

    thread = Thread(target=run, name="decoder ahead")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _side(pixels: int) -> int:
    return max(64, pixels // 64 * 64)
