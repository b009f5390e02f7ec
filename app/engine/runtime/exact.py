"""Blocks of diffusers and layers of transformers as they are, bit-identical to the pipeline's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from app.engine.runtime.networks import Layer, TextEncoder, Transformer
from app.engine.runtime.tokenizer import Tokens


class ExactTransformer(Transformer):
    """Runs the blocks of *network*, diffusers' own."""

    def __init__(self, network: Any) -> None:
        super().__init__(network, _run_doubles, _run_singles)


class ExactTextEncoder(TextEncoder):
    """Runs transformers' own *layers*."""

    def __init__(
        self,
        layers: nn.ModuleList,
        rotary: nn.Module,
        table: torch.Tensor,
        read: tuple[int, ...],
    ) -> None:
        super().__init__(layers, rotary, table, read, _run_layer)

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the prompt embeddings; a prompt without padding has no mask.

        transformers omits it there too, which selects another SDPA kernel; doing the same keeps the
        result bit-identical.
        """
        if tokens.count < tokens.length:
            return super().forward(tokens, device)
        return self._run(self._send(tokens, device)[None, 1:], None)


def _run_doubles(
    blocks: Iterable[nn.Module],
    image: torch.Tensor,
    text: torch.Tensor,
    image_modulation: torch.Tensor,
    text_modulation: torch.Tensor,
    *rope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    for block in blocks:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            temb_mod_img=image_modulation,
            temb_mod_txt=text_modulation,
            image_rotary_emb=rope,
        )
    return image, text


def _run_singles(
    blocks: Iterable[nn.Module],
    hidden: torch.Tensor,
    modulation: torch.Tensor,
    *rope: torch.Tensor,
) -> torch.Tensor:
    for block in blocks:
        hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=None,
            temb_mod=modulation,
            image_rotary_emb=rope,
        )
    return hidden


def _run_layer(
    layer: Layer, hidden: torch.Tensor, mask: torch.Tensor | None, *rotary: torch.Tensor
) -> torch.Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=rotary)
