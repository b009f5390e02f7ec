"""The decode stage: from latents to pixels."""

from __future__ import annotations

import logging

import torch

from app.engine import error_mapping
from app.engine.memory.planner import EXACT_PIXELS
from app.engine.modules.rope import Grid
from app.engine.pipeline import image_tensors
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.latents import latent_statistics
from app.engine.pipeline.tiled_decode import decode_tiled

_log = logging.getLogger(__name__)


def decode(components: PipelineComponents, latents: torch.Tensor, shape: Grid) -> torch.Tensor:
    """Decode packed latents of *shape*, [1, tokens, 4 * c], to pixels [1, 3, h, w] in [-1, 1].

    In tiles where the memory plan or the size needs it, or after a whole decode ran out of memory.
    """
    vae = components.vae
    with components.offloader.on_gpu(vae.decoder):
        packed = latents.permute(0, 2, 1).reshape(1, -1, *shape)  # [1, 4 * c, h, w]
        mean, std = latent_statistics(vae, packed)
        clean = _unpatchify(packed * std + mean).to(vae.decoder.conv_in.weight.dtype)
        if components.is_tiled or _pixels(shape) > EXACT_PIXELS:
            return decode_tiled(components.decode, clean)
        try:
            return components.decode(clean)
        except torch.OutOfMemoryError as error:
            error_mapping.release(error)
        _log.warning("The decode found no room and is done in tiles.")
        return decode_tiled(components.decode, clean)


def _pixels(shape: Grid) -> int:
    return shape[0] * shape[1] * image_tensors.MULTIPLE**2


def _unpatchify(latents: torch.Tensor) -> torch.Tensor:
    """Reshape [1, 4 * c, h, w] -> [1, c, 2 * h, 2 * w]."""
    return torch.pixel_shuffle(latents, 2)
