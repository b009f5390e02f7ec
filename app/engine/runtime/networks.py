"""The transformer and the text encoder as the pipeline sees them, each with two implementations.

`app.engine.runtime.exact` runs the libraries' own blocks, `app.engine.runtime.fused` ours. What a
network does outside its blocks is here, once; an implementation gives the functions that run them.

Shapes: n image and reference tokens, m text tokens, d the hidden size. The batch size is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.runtime.tokenizer import Tokens

Doubles = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Runs double blocks on image, text, their modulations, cos and sin; returns image and text."""

Singles = Callable[..., torch.Tensor]
"""Runs single blocks on all tokens, text first, their modulation, cos and sin."""

Layer = Callable[..., torch.Tensor]
"""A layer of the text encoder, of the hidden states, the mask, cos and sin."""


class Transformer(nn.Module):
    """FLUX.2's transformer; *network* is diffusers' or `flux2_shell`'s.

    Its blocks are those that the implementation can run.

    `Flux2Transformer2DModel.forward` computes the RoPE table in float64 and applies the context
    embedder at every step; here both are inputs. The other operations are the same in the same
    order.
    """

    def __init__(
        self,
        network: Any,
        doubles: Doubles,
        singles: Singles,
    ) -> None:
        super().__init__()
        self.network = network
        self._doubles, self._singles = doubles, singles
        self._variant: Hashable | None = ()

    def set_variant(self, variant: Hashable | None) -> None:
        """Take note of what a graph of a pass depends on besides shapes; None: there is none."""
        self._variant = variant

    def embed_context(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Project prompt embeddings to the hidden size: [1, m, joint size] -> [1, m, d]."""
        context: torch.Tensor = self.network.context_embedder(embeddings)
        return context

    def predict(
        self,
        tokens: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity of *tokens*, output image first, then references: [1, n, channels].

        *timestep* is [1] in 0..1, *context* [1, m, d] comes from `embed_context`, *cos* and *sin*
        from `rope_tables`.
        """
        network = self.network
        embedding = network.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
        image_modulation = network.double_stream_modulation_img(embedding)
        text_modulation = network.double_stream_modulation_txt(embedding)
        single_modulation = network.single_stream_modulation(embedding)
        image, text = self._doubles(
            network.transformer_blocks,
            network.x_embedder(tokens),  # [1, n, d]
            context,
            image_modulation,
            text_modulation,
            cos,
            sin,
        )
        hidden = torch.cat([text, image], dim=1)  # [1, m + n, d]
        hidden = self._singles(
            network.single_transformer_blocks, hidden, single_modulation, cos, sin
        )
        hidden = network.norm_out(hidden[:, context.shape[1] :], embedding)
        velocity: torch.Tensor = network.proj_out(hidden)
        return velocity


class TextEncoder(nn.Module):
    """The layers of Qwen3 up to the last of *read*, the numbers of those that are concatenated.

    *table*, the token embedding, stays in host memory.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        rotary: nn.Module,
        table: torch.Tensor,
        read: tuple[int, ...],
        layer: Layer,
    ) -> None:
        super().__init__()
        self.layers, self.rotary, self.table, self.read = layers, rotary, table, read
        self._layer = layer

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the prompt embeddings, [1, m, layers that are read * hidden size]."""
        return self._encode(self._embed(tokens, device), self._mask(tokens, device))

    def _embed(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the embeddings of *tokens* on *device*, [1, m, d]; padding crosses as one row."""
        rows = functional.embedding(tokens.ids[0, : tokens.count + 1], self.table)
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        places = torch.arange(tokens.ids.shape[1], device=device).clamp(max=len(rows) - 1)
        return rows[places].unsqueeze(0)

    def _encode(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        cos, sin = self.rotary(hidden, positions)
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = self._layer(layer, hidden, mask, cos, sin)
            if number in self.read:
                states.append(hidden)
        return torch.cat(states, dim=-1)

    def _mask(self, tokens: Tokens, device: torch.device) -> torch.Tensor | None:
        """Return the causal mask without padding's keys, bool [1, 1, m, m], on *device*."""
        length = tokens.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return (causal & (torch.arange(length, device=device) < tokens.count))[None, None]
