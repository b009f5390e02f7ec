"""Shapes and statistics of latents that several stages use."""

from __future__ import annotations

from typing import Any

import torch


def latent_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch-norm mean and standard deviation, [1, 4 * c, 1, 1], as *like* is placed."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like.device, like.dtype)
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return mean, torch.sqrt(variance).to(like.device, like.dtype)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Reshape [1, c, h, w] -> [1, h * w, c]."""
    return latents.flatten(2).permute(0, 2, 1)


def unpack(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reshape [1, h * w, c] -> [1, c, h, w]."""
    return latents.permute(0, 2, 1).reshape(1, -1, height, width)
