"""Forward passes of diffusers' and transformers' own modules, bit-identical to the pipeline's.

`Flux2Transformer2DModel.forward` computes the RoPE table in float64 and applies the context
embedder at every step; here both are inputs. The other operations are the same in the same order.

Shapes: n image and reference tokens, m text tokens, d the hidden size.
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
    """Predict the velocity of *tokens*, output image first, then references: [1, n, channels].

    *timestep* is [1] in 0..1, *context* [1, m, d] the prompt embeddings after the context embedder,
    *rope* comes from `RopeTable`.
    """
    embedding = transformer.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
    image_modulation = transformer.double_stream_modulation_img(embedding)
    text_modulation = transformer.double_stream_modulation_txt(embedding)
    single_modulation = transformer.single_stream_modulation(embedding)
    hidden = transformer.x_embedder(tokens)  # [1, n, d]
    text_length = context.shape[1]
    for block in transformer.transformer_blocks:
        context, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=context,
            temb_mod_img=image_modulation,
            temb_mod_txt=text_modulation,
            image_rotary_emb=rope,
        )
    hidden = torch.cat([context, hidden], dim=1)  # [1, m + n, d]
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
    """The first 27 layers of Qwen3; *table*, the token embedding, stays in host memory."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module, table: torch.Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.rotary = rotary
        self.table = table

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the prompt embeddings, [1, m, 3 * hidden size]."""
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
        """Run the layers on *hidden* and concatenate the hidden states of `TEXT_LAYERS`."""
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if number in TEXT_LAYERS:
                states.append(hidden)
        return torch.cat(states, dim=-1)


def attention_mask(mask: torch.Tensor) -> torch.Tensor | None:
    """Return the causal mask with padding, bool [1, 1, m, m], or None for a prompt without padding.

    transformers omits the mask there too, which selects another SDPA kernel; doing the same keeps
    the result bit-identical.
    """
    if bool(mask.all()):
        return None
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (causal & mask.bool()[:, None, :]).unsqueeze(1)
