"""Pictures of a job on its way: the present estimate of the clean latents, decoded small.

A preview may cost little, for it delays the picture itself: the latents are averaged down to at
most 256 pixels a side before they are decoded, a sixteenth of the work at 1024x1024.
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

_LONGEST_TOKENS = 16


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """Choose after which of *steps* to show one of *previews*, evenly and never after the last."""
    wanted = {round(steps * number / (previews + 1)) for number in range(1, previews + 1)}
    return frozenset(step for step in wanted if 0 < step < steps)


def preview(
    components: PipelineComponents, estimate: Callable[[], torch.Tensor], shape: Grid
) -> RawImage:
    """Decode a small picture of what is there now."""
    height, width = shape
    scale = min(1.0, _LONGEST_TOKENS / max(height, width))
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    latents = estimate()
    if small != shape:
        plane = latents.permute(0, 2, 1).reshape(1, -1, height, width)
        plane = functional.adaptive_avg_pool2d(plane, small)
        latents = plane.flatten(2).permute(0, 2, 1)
    image = image_tensors.to_raw(image_tensors.to_bytes(decode(components, latents, small)).cpu())
    # Its way out is the pickler, which takes no views.
    return replace(image, pixels=bytes(image.pixels))
