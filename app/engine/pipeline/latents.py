"""Shapes and statistics of latents that several stages need."""

from __future__ import annotations

from typing import Any

import torch

from app.domain import ImageSpec
from app.engine.modules.rope import Grid
from app.engine.pipeline import image_tensors


def grid(spec: ImageSpec) -> Grid:
    """The picture's tokens: rows and columns."""
    return spec.height // image_tensors.MULTIPLE, spec.width // image_tensors.MULTIPLE


def latent_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like.device, like.dtype)
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return mean, torch.sqrt(variance).to(like.device, like.dtype)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[1, channels, h, w] -> [1, h * w, channels]."""
    return latents.flatten(2).permute(0, 2, 1)
