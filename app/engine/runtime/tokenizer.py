"""Qwen's tokenizer and the chat template that the model was trained with."""

from __future__ import annotations

from collections.abc import Callable
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


class Tokenizer:
    """Applies the chat template of transformers' *tokenizer*, tokenizes, truncates and pads.

    The ids are those of `Flux2KleinPipeline`, for a sequence of *max_length* tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._frame = _find_frame(self._render)
        # Both are looked up anew at each access.
        self._backend = tokenizer.backend_tokenizer
        self._padding = np.full((1, max_length), tokenizer.pad_token_id)

    def __call__(self, prompt: str) -> Tokens:
        """Tokenize *prompt*."""
        text = self._render(prompt) if self._frame is None else prompt.join(self._frame)
        # What `__call__` does around this takes as long again.
        ids: list[int] = self._backend.encode(text).ids
        kept = ids[: self.max_length]
        # torch.tensor() takes as long for a list of this length.
        padded = self._padding.copy()
        padded[0, : len(kept)] = kept
        return Tokens(torch.from_numpy(padded), count=len(kept), is_cut=len(ids) > len(kept))

    def _render(self, prompt: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return text


_SAMPLES = ("a fox", " \n two\n\n words ", "<tool_response>a</tool_response>", "{{ a }} {% b %}")
"""Prompts that a template might change or look into."""


def _find_frame(render: Callable[[str], str]) -> tuple[str, str] | None:
    """Return what the chat template puts before and after a prompt; None where that varies.

    To render it anew takes a quarter of a millisecond, several times what the tokens take.
    """
    mark = "\N{REPLACEMENT CHARACTER}"
    before, _, after = render(mark).partition(mark)
    is_fixed = all(render(each) == before + each + after for each in _SAMPLES)
    return (before, after) if is_fixed else None
