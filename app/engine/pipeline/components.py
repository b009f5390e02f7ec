"""The loaded components of one model, as the stages use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.engine.memory.offload import Offloader
from app.engine.modules.rope import Rope, RopeTable
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.runtime.tokenizer import Tokenizer, Tokens

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rope], torch.Tensor]
"""Predicts the velocity from tokens, timestep, context and RoPE table: `transformer_forward`."""


@dataclass(slots=True)
class PipelineComponents:
    """Everything that generates an image. Not thread-safe: the engine's thread alone uses it."""

    tokenizer: Tokenizer
    encoder: Callable[[Tokens, torch.device], torch.Tensor]
    cache: PromptCache
    transformer: Any
    """`Flux2Transformer2DModel`, with diffusers' own blocks or with fused ones."""
    predict: Predict
    vae: Any
    decode: Callable[[torch.Tensor], torch.Tensor]
    """The VAE decoder, compiled or not: [1, c, h, w] -> [1, 3, 8 * h, 8 * w]."""
    make_scheduler: Callable[[], Any]
    """Creates a scheduler per image, so that no state is kept between images."""
    device: torch.device
    dtype: torch.dtype
    is_distilled: bool
    is_tiled: bool
    offloader: Offloader
    rope: RopeTable
    layout: str
    weights_bytes: int
