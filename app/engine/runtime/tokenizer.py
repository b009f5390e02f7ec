"""Qwen's tokenizer with the chat template that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt in the encoder's words: *mask* is 1 for real tokens, 0 for padding."""

    ids: torch.Tensor
    mask: torch.Tensor
    count: int
    is_cut: bool


class Tokenizer:
    """Qwen's tokenizer with the chat template that the model was trained with."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __call__(self, prompt: str) -> Tokens:
        """Turn *prompt* into padded tokens, cut as the pipeline cuts it."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        ids: list[int] = self._tokenizer(text).input_ids
        kept = ids[: self._max_length]
        padding = self._max_length - len(kept)
        return Tokens(
            ids=torch.tensor([kept + [self._tokenizer.pad_token_id] * padding]),
            mask=torch.tensor([[1] * len(kept) + [0] * padding]),
            count=len(kept),
            is_cut=len(ids) > len(kept),
        )
