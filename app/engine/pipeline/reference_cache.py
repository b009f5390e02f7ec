"""An LRU cache of reference latents in host memory.

A reference that comes again (n images of one edit, a user who tries prompts or seeds) skips the VAE
encoder. An entry is bit-identical to the encoder's output, so a hit changes no pixel. A cache
belongs to one loaded VAE, so a picture and its role are the whole key. The digest is computed here
and not where uploads are decoded: one decoder that a picture has taken over could otherwise put
its latents in place of another client's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch

from app.domain import ImageSpec

_PICTURE_BYTES = 2**20
"""Of one megapixel's latents in bf16: 4096 tokens of 128 channels."""


@dataclass(frozen=True, slots=True)
class ReferenceKey:
    """What the latents of a reference depend on, besides the VAE.

    *fitted_to* is the output's size where the picture is a masked edit's source, else None.
    """

    digest: bytes
    size: tuple[int, int]
    fitted_to: tuple[int, int] | None


def reference_keys(spec: ImageSpec) -> tuple[ReferenceKey, ...]:
    """Return the key of each reference; hashing takes 2 to 4 ms for a megapixel."""
    output = (spec.width, spec.height)
    return tuple(
        ReferenceKey(
            hashlib.sha256(image.pixels).digest(),
            (image.width, image.height),
            output if number == 0 and spec.mask is not None else None,
        )
        for number, image in enumerate(spec.references)
    )


class ReferenceCache:
    """Keeps the latents of the references used last, *size* of one megapixel. Not thread-safe.

    What counts are bytes: a picture of four megapixels takes four places, and one that needs more
    than there are is not kept.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._device = device
        self._entries: OrderedDict[ReferenceKey, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: ReferenceKey) -> torch.Tensor | None:
        """Return a copy of the latents of *key* on the device, [1, c, h, w], or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        # A copy on the CPU too, so that no caller can change the entry.
        return self._entries[key].to(self._device, copy=True)

    def put(self, key: ReferenceKey, latents: torch.Tensor) -> None:
        """Copy *latents*, [1, c, h, w], to host memory, unless they are cached or too large."""
        limit = self.size * _PICTURE_BYTES
        if key in self._entries or latents.nbytes > limit:
            return
        self._entries[key] = latents.to("cpu", copy=True)
        self._bytes += latents.nbytes
        while self._bytes > limit:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes
