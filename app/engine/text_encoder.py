"""From a prompt to the embeddings that condition the picture.

Qwen3 is used for three hidden states, after its layers 9, 18 and 27. So only 27 layers are kept: no
final norm (the 27-layer model would return its last state normed, which is not what the pipeline
reads), no logits, and the embedding table stays in host memory, since 512 rows of it are all that a
prompt needs. It knows tokens and layers, not what the picture is made with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.fit import TEXT_LAYERS


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


class TextEncoder(nn.Module):
    """The first 27 layers of Qwen3. *table* is the embedding table, which stays on the host."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module, table: torch.Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.rotary = rotary
        self.table = table

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the embeddings, of shape [1, tokens, 3 x hidden]."""
        hidden = functional.embedding(tokens.ids, self.table).to(device, non_blocking=True)
        mask = attention_mask(tokens.mask)
        if mask is not None:
            mask = mask.to(device, non_blocking=True)
        positions = torch.arange(hidden.shape[1], device=device).unsqueeze(0)
        return self.run(hidden, mask, self.rotary(hidden, positions))

    def run(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Pass *hidden* through the layers and join the three states that are read."""
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if number in TEXT_LAYERS:
                states.append(hidden)
        return torch.cat(states, dim=-1)


def attention_mask(mask: torch.Tensor) -> torch.Tensor | None:
    """Build the causal mask with padding, [1, 1, n, n]; None where plain causality is the same.

    transformers leaves the mask out for a prompt without padding, which picks another kernel; doing
    the same keeps the result equal to the last bit.
    """
    if bool(mask.all()):
        return None
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & mask.bool()[:, None, :]).unsqueeze(1)
