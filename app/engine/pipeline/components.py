"""The loaded pieces of one model, as the stages use them."""

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


@dataclass(slots=True)
class PipelineComponents:
    """Everything a picture is made with. The engine's thread owns it; nobody else touches it."""

    tokenizer: Tokenizer
    encoder: Callable[[Tokens, torch.device], torch.Tensor]
    cache: PromptCache
    transformer: Any
    """diffusers' model, whole or as the shell of our blocks."""
    predict: Predict
    vae: Any
    decode: Callable[[torch.Tensor], torch.Tensor]
    """The VAE's decoder, compiled or not: [1, c, h, w] -> [1, 3, 8 h, 8 w]."""
    make_scheduler: Callable[[], Any]
    """A fresh scheduler for each picture, so that no picture leaves anything for the next."""
    device: torch.device
    dtype: torch.dtype
    is_distilled: bool
    is_tiled: bool
    offloader: Offloader
    rope: RopeTable
    layout: str
    weights_bytes: int
    features: tuple[str, ...] = ()
