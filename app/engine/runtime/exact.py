"""One pass of the transformer, with what does not change between steps taken out of it.

diffusers' own forward computes the rotary table in float64 at every step and embeds the prompt
anew; here both are given. The rest is the same operations in the same order, so the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.models.flux2_klein import TEXT_LAYERS
from app.engine.modules.rope import Rope
from app.engine.runtime.tokenizer import Tokens


def transformer_forward(
    transformer: Any,
    tokens: torch.Tensor,
    timestep: torch.Tensor,
    context: torch.Tensor,
    rope: Rope,
) -> torch.Tensor:
    """Predict the velocity of *tokens* (picture first, then references) at *timestep* in 0..1.

    *context* is the prompt after the transformer's context embedder, *rope* from `RopeTable`.
    """
    embedding = transformer.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
    image_modulation = transformer.double_stream_modulation_img(embedding)
    text_modulation = transformer.double_stream_modulation_txt(embedding)
    single_modulation = transformer.single_stream_modulation(embedding)
    hidden = transformer.x_embedder(tokens)
    text_length = context.shape[1]
    for block in transformer.transformer_blocks:
        context, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            temb_mod_img=image_modulation,
            temb_mod_txt=text_modulation,
            image_rotary_emb=rope,
        )
    hidden = torch.cat([context, hidden], dim=1)
    for block in transformer.single_transformer_blocks:
        hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=None,
            temb_mod=single_modulation,
            image_rotary_emb=rope,
        )
    hidden = transformer.norm_out(hidden[:, text_length:], embedding)
    velocity: torch.Tensor = transformer.proj_out(hidden)
    return velocity


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
