"""The loaded pieces of one model, as the stages use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.engine.network import RopeTable
from app.engine.residency import Residency
from app.engine.text_encoder import TextEncoder, Tokenizer


@dataclass(slots=True)
class Parts:
    """Everything a picture is made with. The engine's thread owns it; nobody else touches it."""

    tokenizer: Tokenizer
    encoder: TextEncoder
    transformer: Any
    vae: Any
    make_scheduler: Callable[[], Any]
    """A fresh scheduler for each picture, so that no picture leaves anything for the next."""
    device: torch.device
    dtype: torch.dtype
    is_distilled: bool
    residency: Residency
    rope: RopeTable
    layout: str
    weights_bytes: int
