"""Embeddings of recent prompts, in host memory.

A prompt that comes again (n pictures of one request, a user who tries seeds) skips the encoder. An
entry is what the encoder made, bit by bit, so a hit changes no pixel. The cache lives and dies with
one loaded encoder at one precision, so the prompt alone is its key.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from app.engine.runtime.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """One prompt: its tokens, and the place of its embeddings."""

    tokens: Tokens
    place: int


class PromptCache:
    """Keeps *size* prompts, forgetting the least recently used. The engine's thread alone uses it.

    Its memory is taken once, at the first prompt, and pinned where there is a card: pinning anew
    for each entry would take longer than the encoder.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._entries: OrderedDict[str, CachedPrompt] = OrderedDict()
        self._store: torch.Tensor | None = None

    @property
    def is_on(self) -> bool:
        """Whether it keeps anything."""
        return self._size > 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, prompt: str) -> tuple[Tokens, torch.Tensor] | None:
        """Return the tokens and embeddings of *prompt*, on the card, or None."""
        entry = self._entries.get(prompt)
        if entry is None or self._store is None:
            return None
        self._entries.move_to_end(prompt)
        # A copy, on a processor too: nobody may change what is kept.
        value = torch.empty_like(self._store[entry.place], device=self._device)
        return entry.tokens, value.copy_(self._store[entry.place], non_blocking=True)

    def put(self, prompt: str, tokens: Tokens, embeddings: torch.Tensor) -> None:
        """Keep the *embeddings* of *prompt*, unless they are kept; the copy runs beside what comes
        next.
        """
        if self._size == 0 or prompt in self._entries:
            return
        if self._store is None:
            self._store = torch.empty(
                (self._size, *embeddings.shape),
                dtype=embeddings.dtype,
                pin_memory=self._device.type == "cuda",
            )
        place = len(self._entries)
        if place == self._size:
            place = self._entries.popitem(last=False)[1].place
        self._store[place].copy_(embeddings, non_blocking=True)
        self._entries[prompt] = CachedPrompt(tokens, place)
