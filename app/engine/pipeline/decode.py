"""The decode stage: from latents to pixels, and to previews of a running job.

A preview is the current estimate of the clean latents, decoded small. It delays the image itself,
so it has to be cheap: the latents are average-pooled to at most 256 pixels a side before the
decode, a sixteenth of the work at 1024x1024.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from app.domain import RawImage
from app.engine import error_mapping
from app.engine.modules.rope import Grid
from app.engine.pipeline import image_tensors
from app.engine.pipeline.components import PipelineComponents, pack, unpack
from app.engine.pipeline.tiled_decode import decode_tiled
from app.limits import PREVIEW_SIDE

_log = logging.getLogger(__name__)


def decode(components: PipelineComponents, latents: torch.Tensor, shape: Grid) -> torch.Tensor:
    """Decode packed latents of *shape*, [1, tokens, 4 * c], to pixels [1, 3, h, w] in [-1, 1].

    In tiles where the memory plan or the size needs it; in small ones where the plan does, or after
    the decode ran out of memory.
    """
    vae, architecture = components.vae, components.architecture
    with components.offloader.on_gpu(vae.decoder):
        packed = unpack(latents, *shape)  # [1, 4 * c, h, w]
        mean, std = components.latent_statistics(packed)
        # [1, c, 2 * h, 2 * w]
        clean = torch.pixel_shuffle(packed * std + mean, 2).to(vae.decoder.conv_in.weight.dtype)
        pixels = shape[0] * shape[1] * architecture.token_pixels
        side = architecture.latent_side
        if not components.is_tiled:
            try:
                if pixels <= architecture.exact_pixels:
                    return components.decode(clean)
                return decode_tiled(components.decode, clean, side, architecture.large_tile)
            except torch.OutOfMemoryError as error:
                error_mapping.release(error)
            _log.warning("The decode found no room and is done in tiles.")
        return decode_tiled(components.decode, clean, side)


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """Return the steps after which a preview is made: evenly spaced, never the last."""
    wanted = {round(steps * number / (previews + 1)) for number in range(1, previews + 1)}
    return frozenset(step for step in wanted if 0 < step < steps)


def preview(
    components: PipelineComponents, estimate: Callable[[], torch.Tensor], shape: Grid
) -> RawImage:
    """Decode the current estimate of the clean latents as a small image."""
    height, width = shape
    longest = PREVIEW_SIDE // components.architecture.token_side
    scale = min(1.0, longest / max(height, width))
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    latents = estimate()
    if small != shape:
        latents = pack(functional.adaptive_avg_pool2d(unpack(latents, height, width), small))
    image = image_tensors.to_raw(image_tensors.to_bytes(decode(components, latents, small)).cpu())
    # Previews are pickled, and a memoryview cannot be.
    return replace(image, pixels=bytes(image.pixels))
