"""The decode stage: from latents to pixels."""

from __future__ import annotations

import logging

import torch

from app.engine import error_mapping
from app.engine.modules.rope import Grid
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.latents import latent_statistics, unpack
from app.engine.pipeline.tiled_decode import decode_tiled

_log = logging.getLogger(__name__)


def decode(components: PipelineComponents, latents: torch.Tensor, shape: Grid) -> torch.Tensor:
    """Decode packed latents of *shape*, [1, tokens, 4 * c], to pixels [1, 3, h, w] in [-1, 1].

    In tiles where the memory plan or the size needs it, or after a whole decode ran out of memory.
    """
    vae, architecture = components.vae, components.architecture
    with components.offloader.on_gpu(vae.decoder):
        packed = unpack(latents, *shape)  # [1, 4 * c, h, w]
        mean, std = latent_statistics(vae, packed)
        clean = torch.pixel_shuffle(packed * std + mean, 2)  # [1, c, 2 * h, 2 * w]
        clean = clean.to(vae.decoder.conv_in.weight.dtype)
        pixels = shape[0] * shape[1] * architecture.token_pixels
        if not components.is_tiled and pixels <= architecture.exact_pixels:
            try:
                return components.decode(clean)
            except torch.OutOfMemoryError as error:
                error_mapping.release(error)
            _log.warning("The decode found no room and is done in tiles.")
        return decode_tiled(components.decode, clean, architecture.latent_side)
