"""Qwen's tokenizer and the chat template that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt, padded to the maximum sequence length.

    *ids* are int64 [1, n]: *count* tokens, then padding. *is_cut* says whether the prompt was
    truncated.
    """

    ids: torch.Tensor
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
        # What `__call__` does around this takes as long again.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text).ids
        kept = ids[: self.max_length]
        # torch.tensor() takes as long for a list of this length.
        padded = np.full((1, self.max_length), self.tokenizer.pad_token_id)
        padded[0, : len(kept)] = kept
        return Tokens(torch.from_numpy(padded), count=len(kept), is_cut=len(ids) > len(kept))
