"""An LRU cache of prompt embeddings in host memory.

A repeated prompt (n images of one request, a user who tries seeds) skips the text encoder. An entry
is bit-identical to the encoder's output, so a hit changes no pixel. A cache belongs to one loaded
encoder at one precision, so the prompt alone is the key.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from app.engine.runtime.tokenizer import Tokens


class PromptCache:
    """Keeps the embeddings of the *size* most recently used prompts. Not thread-safe.

    Its memory is allocated once, at the first prompt, and pinned for a GPU: pinning memory for each
    entry would take longer than the encoder. Embeddings are copied there on a stream of their own,
    while the GPU goes on with the image.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._device = device
        self._entries: OrderedDict[str, tuple[Tokens, int]] = OrderedDict()
        """The tokens of a prompt, and the index of its embeddings in the store."""
        self._store: torch.Tensor | None = None
        is_gpu = device.type == "cuda"
        self._lanes: Any = torch.cuda if is_gpu else torch.cpu
        self._copies: Any = self._lanes.Stream(device) if is_gpu else torch.cpu.Stream()

    def get(self, prompt: str) -> tuple[Tokens, torch.Tensor] | None:
        """Return the tokens and a copy of the embeddings of *prompt* on the device, or None."""
        if self._store is None or prompt not in self._entries:
            return None
        self._entries.move_to_end(prompt)
        tokens, place = self._entries[prompt]
        # A copy on the CPU too, so that no caller can change the entry.
        value = torch.empty_like(self._store[place], device=self._device)
        self._lanes.current_stream().wait_stream(self._copies)
        return tokens, value.copy_(self._store[place], non_blocking=True)

    def put(self, prompt: str, tokens: Tokens, embeddings: torch.Tensor) -> None:
        """Store the *embeddings* of *prompt*, unless it is cached; the copy is asynchronous."""
        if self.size == 0 or prompt in self._entries:
            return
        if self._store is None:
            self._store = torch.empty(
                (self.size, *embeddings.shape),
                dtype=embeddings.dtype,
                pin_memory=self._device.type == "cuda",
            )
        place = len(self._entries)
        if place == self.size:
            _, (_, place) = self._entries.popitem(last=False)
        self._copies.wait_stream(self._lanes.current_stream())
        with self._lanes.stream(self._copies):
            self._store[place].copy_(embeddings, non_blocking=True)
        if embeddings.is_cuda:
            embeddings.record_stream(self._copies)
        self._entries[prompt] = tokens, place
