"""The loaded components of one model, as the stages use them, and the layout of its latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.domain import ImageSpec
from app.engine.adapters.active import ActiveAdapters
from app.engine.memory.offload import Offloader
from app.engine.models.entry import Architecture
from app.engine.modules.rope import Grid, Rope
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.pipeline.reference_cache import ReferenceCache
from app.engine.pipeline.schedule import Schedule
from app.engine.runtime.networks import TextEncoder, Transformer
from app.engine.runtime.tokenizer import Tokenizer


@dataclass(slots=True)
class PipelineComponents:
    """Everything that generates an image. Not thread-safe: the engine's thread alone uses it."""

    architecture: Architecture
    tokenizer: Tokenizer
    encoder: TextEncoder
    cache: PromptCache
    references: ReferenceCache
    transformer: Transformer
    adapters: ActiveAdapters
    vae: Any
    """diffusers' `AutoencoderKLFlux2`, or ours of the same name."""
    decode: Callable[[torch.Tensor], torch.Tensor]
    """The VAE decoder, its own or ours: [1, c, h, w] -> [1, 3, 8 * h, 8 * w]."""
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    is_distilled: bool
    is_tiled: bool
    holds_encoder: bool
    """Whether the text encoder stays on the device, so that it is launched without waiting."""
    offloader: Offloader
    rope: Callable[[int, tuple[Grid, ...]], Rope]
    """The RoPE table of a text length and grids: `app.engine.modules.rope.rope_tables`."""
    weights_bytes: int

    def grid(self, spec: ImageSpec) -> Grid:
        """Return the rows and columns of the output's tokens."""
        side = self.architecture.token_side
        return spec.height // side, spec.width // side

    def latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the VAE's mean and standard deviation, [1, 4 * c, 1, 1], as *like* is placed."""
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean = norm.running_mean.view(1, -1, 1, 1).to(like.device, like.dtype)
        variance = norm.running_var.view(1, -1, 1, 1) + eps
        return mean, torch.sqrt(variance).to(like.device, like.dtype)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Reshape [1, c, h, w] -> [1, h * w, c]."""
    return latents.flatten(2).permute(0, 2, 1)


def unpack(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reshape [1, h * w, c] -> [1, c, h, w]."""
    return latents.permute(0, 2, 1).reshape(1, -1, height, width)
