"""Previews of a running job: the current estimate of the clean latents, decoded small.

A preview delays the image itself, so it has to be cheap: the latents are average-pooled to at most
256 pixels a side before the decode, a sixteenth of the work at 1024x1024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from app.domain import RawImage
from app.engine.modules.rope import Grid
from app.engine.pipeline import image_tensors
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.decode import decode
from app.engine.pipeline.latents import pack, unpack

_LONGEST_SIDE = 256


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """Return the steps after which a preview is made: evenly spaced, never the last."""
    wanted = {round(steps * number / (previews + 1)) for number in range(1, previews + 1)}
    return frozenset(step for step in wanted if 0 < step < steps)


def preview(
    components: PipelineComponents, estimate: Callable[[], torch.Tensor], shape: Grid
) -> RawImage:
    """Decode the current estimate of the clean latents as a small image."""
    height, width = shape
    longest = _LONGEST_SIDE // components.architecture.token_side
    scale = min(1.0, longest / max(height, width))
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    latents = estimate()
    if small != shape:
        latents = pack(functional.adaptive_avg_pool2d(unpack(latents, height, width), small))
    image = image_tensors.to_raw(image_tensors.to_bytes(decode(components, latents, small)).cpu())
    # Previews are pickled, and a memoryview cannot be.
    return replace(image, pixels=bytes(image.pixels))
