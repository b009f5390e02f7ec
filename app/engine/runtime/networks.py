"""The transformer and the text encoder as the pipeline sees them, each with two implementations.

`app.engine.runtime.exact` runs the libraries' own blocks, `app.engine.runtime.fused` ours. What a
network does outside its blocks is here, once; an implementation gives the functions that run them.

Shapes: n image and reference tokens, m text tokens, d the hidden size. The batch size is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from app.engine.runtime.tokenizer import Tokens

_COUNT_BYTES = 8

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
        self._table_bytes = _bytes(table)
        self._layer = layer
        self._inbox: torch.Tensor | None = None

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the prompt embeddings, [1, m, layers that are read * hidden size]."""
        return self._encode(self._send(tokens, device))

    def _send(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Send the embeddings of *tokens* to *device* in one copy; return them as [1 + m, d].

        It is the same tensor each time, which the next prompt overwrites. The first row begins with
        the count of tokens, int64. Padding crosses as one row, after the prompt's; those after it
        are not set.
        """
        ids = tokens.ids.numpy()[0, : tokens.count + 1]
        width = self.table.shape[1]
        sent = self.table.new_empty(1 + len(ids), width, pin_memory=device.type == "cuda")
        filled = _bytes(sent)
        filled[0, :_COUNT_BYTES].view(np.int64)[0] = tokens.count
        # torch would wake its threads for these few rows, which takes several times as long.
        filled[1:] = self._table_bytes[ids]
        size = 1 + tokens.ids.shape[1], width
        if self._inbox is None or self._inbox.shape != size:
            self._inbox = self.table.new_empty(size, device=device)
        self._inbox[: len(sent)].copy_(sent, non_blocking=True)
        return self._inbox

    def _encode(self, inbox: torch.Tensor) -> torch.Tensor:
        """Run the layers on what `_send` returns; nothing here depends on the prompt's length."""
        count, rows = _received(inbox)
        return self._run(_spread(rows, count), _mask(len(rows), count))

    def _run(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        cos, sin = self.rotary(hidden, positions)
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = self._layer(layer, hidden, mask, cos, sin)
            if number in self.read:
                hidden = self._settled(hidden)
                states.append(hidden)
        return torch.cat(states, dim=-1)

    def _settled(self, hidden: Any) -> torch.Tensor:
        """Return a layer's hidden states as a tensor, [1, m, d]."""
        made: torch.Tensor = hidden
        return made


def _bytes(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return *rows*, [n, d], in host memory as the same memory: uint8 [n, bytes of a row]."""
    found: np.ndarray[Any, Any] = rows.view(torch.uint8).numpy()
    return found


def _received(inbox: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the count of tokens, int64 [], and the rows, [m, d], of `TextEncoder._send`."""
    return inbox[0].view(torch.uint8)[:_COUNT_BYTES].view(torch.int64)[0], inbox[1:]


def _spread(rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Repeat the row of padding, number *count*, to the end: [m, d] -> [1, m, d]."""
    places = torch.arange(len(rows), device=rows.device).minimum(count)
    return rows.index_select(0, places).unsqueeze(0)


def _mask(length: int, count: torch.Tensor) -> torch.Tensor:
    """Return the causal mask without padding's keys, bool [1, 1, m, m]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=count.device).tril()
    return (causal & (torch.arange(length, device=count.device) < count))[None, None]
