"""The last stage: from latents to pixels."""

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
    """Turn packed latents of *shape* into the VAE's pixels, [1, 3, h, w] in [-1, 1].

    In tiles where the plan or the size asks for it, or, once, where the whole finds no room.
    """
    vae = components.vae
    with components.offloader.on_gpu(vae.decoder):
        packed = latents.permute(0, 2, 1).reshape(1, -1, *shape)
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
    """[1, 4c, h, w] -> [1, c, 2h, 2w]."""
    return torch.pixel_shuffle(latents, 2)
