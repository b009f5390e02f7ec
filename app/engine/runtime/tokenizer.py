"""Qwen's tokenizer and the chat template that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt, padded to the maximum sequence length.

    *ids* and *mask* are int64 [1, n]; the attention mask is 1 for tokens, 0 for padding. *count* is
    the number of tokens without padding, *is_cut* whether the prompt was truncated.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    count: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Applies the chat template, then tokenizes, truncates and pads to *max_length*."""

    tokenizer: Any
    max_length: int

    def __call__(self, prompt: str) -> Tokens:
        """Tokenize *prompt*, truncated and padded as `Flux2KleinPipeline` does."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        ids: list[int] = self.tokenizer(text).input_ids
        kept = ids[: self.max_length]
        padding = self.max_length - len(kept)
        return Tokens(
            ids=torch.tensor([kept + [self.tokenizer.pad_token_id] * padding]),
            mask=torch.tensor([[1] * len(kept) + [0] * padding]),
            count=len(kept),
            is_cut=len(ids) > len(kept),
        )
