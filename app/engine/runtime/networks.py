"""The transformer and the text encoder as the pipeline sees them, each with two implementations.

`app.engine.runtime.exact` runs the libraries' own blocks, `app.engine.runtime.fused` ours. What a
network does outside its blocks is here, once; an implementation gives the functions that run them.

Shapes: n image and reference tokens, m text tokens, d the hidden size. The batch size is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

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
        return self._pass(tokens, timestep, context, cos, sin)

    def _pass(
        self,
        tokens: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        is_sample: bool = False,
    ) -> torch.Tensor:
        """Do what `predict` does; as a sample, with one block of each combination of layers."""
        network = self.network
        doubles, singles = network.transformer_blocks, network.single_transformer_blocks
        if is_sample:
            doubles, singles = _sample(doubles), _sample(singles)
        embedding = network.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
        image_modulation = network.double_stream_modulation_img(embedding)
        text_modulation = network.double_stream_modulation_txt(embedding)
        single_modulation = network.single_stream_modulation(embedding)
        image, text = self._doubles(
            doubles,
            network.x_embedder(tokens),  # [1, n, d]
            context,
            image_modulation,
            text_modulation,
            cos,
            sin,
        )
        hidden = torch.cat([text, image], dim=1)  # [1, m + n, d]
        hidden = self._singles(singles, hidden, single_modulation, cos, sin)
        hidden = network.norm_out(hidden[:, context.shape[1] :], embedding)
        velocity: torch.Tensor = network.proj_out(hidden)
        return velocity


def _sample(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return one of *blocks* for each combination of classes that their layers have."""
    kinds = {tuple(type(layer) for layer in block.modules()): block for block in blocks}
    return list(kinds.values())


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
        self._mails: dict[int, _Mail] = {}
        self._frames: dict[int, _Frame] = {}

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the prompt embeddings, [1, m, layers that are read * hidden size]."""
        return self._encode(self._send(tokens, device))

    def _send(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Send the embeddings of *tokens* to *device* in one copy; return them as [1 + m, d].

        It is the same tensor each time, which the next prompt overwrites. The first row begins with
        the count of tokens, int64. Padding crosses as one row, after the prompt's; those after it
        are not set.
        """
        if (mail := self._mails.get(tokens.length)) is None:
            mail = _Mail(self.table, tokens.length, device)
            # Never while a graph is captured: it would be filled at a replay only.
            self._framed(mail.inbox[1:])
            self._mails[tokens.length] = mail
        is_padded = tokens.count < tokens.length
        ids = [*tokens.ids, tokens.padding] if is_padded else tokens.ids
        # torch would wake its threads for these few rows, which takes several times as long.
        mail.send(tokens.count, self._table_bytes[ids])
        return mail.inbox

    def _encode(self, inbox: torch.Tensor) -> torch.Tensor:
        """Run the layers on what `_send` returns; nothing here depends on the prompt's length."""
        count, rows = _received(inbox)
        frame = self._framed(rows)
        is_own = frame.places < count
        # Padding is number *count* of the rows.
        hidden = rows.index_select(0, frame.places.minimum(count)).unsqueeze(0)
        return self._run(hidden, (frame.causal & is_own)[None, None])

    def _run(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        frame = self._framed(hidden[0])
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = self._layer(layer, hidden, mask, frame.cos, frame.sin)
            if number in self.read:
                hidden = self._settled(hidden)
                states.append(hidden)
        return torch.cat(states, dim=-1)

    def _framed(self, rows: torch.Tensor) -> _Frame:
        """Return what is the same for all prompts of the length of *rows*, [m, d]."""
        if (frame := self._frames.get(len(rows))) is None:
            places = torch.arange(len(rows), device=rows.device)
            causal = places <= places[:, None]
            frame = _Frame(places, causal, *self.rotary(rows[None], places[None]))
            self._frames[len(rows)] = frame
        return frame

    def _settled(self, hidden: Any) -> torch.Tensor:
        """Return a layer's hidden states as a tensor, [1, m, d]."""
        made: torch.Tensor = hidden
        return made


class _Frame(NamedTuple):
    """What the text encoder needs for any prompt of m tokens.

    *places* are 0 to m - 1, int64; *causal*, bool [m, m], is True where a key is at the query's
    place or before it; *cos* and *sin* are [1, m, s].
    """

    places: torch.Tensor
    causal: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class _Mail:
    """Where the embeddings of a prompt are sent from, and *inbox*, where they arrive: [1 + m, d].

    Both are allocated once: to find pinned memory for each prompt takes longer than the copy.
    """

    def __init__(self, like: torch.Tensor, tokens: int, device: torch.device) -> None:
        size, is_gpu = (1 + tokens, like.shape[1]), device.type == "cuda"
        self.inbox = like.new_empty(size, device=device)
        self._outbox = like.new_empty(size, pin_memory=is_gpu)
        self._filled = _bytes(self._outbox)
        self._count = self._filled[0, :_COUNT_BYTES].view(np.int64)
        self._sent: Any = None
        if is_gpu:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, count: int, rows: np.ndarray[Any, Any]) -> None:
        """Send *count* and *rows*, uint8 [n, bytes of a row], once the previous copy has ended."""
        if self._sent is not None:
            self._sent.synchronize()
        end = 1 + len(rows)
        self._count[0] = count
        self._filled[1:end] = rows
        self.inbox[:end].copy_(self._outbox[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.inbox.device))


def _bytes(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return *rows*, [n, d], in host memory as the same memory: uint8 [n, bytes of a row]."""
    found: np.ndarray[Any, Any] = rows.view(torch.uint8).numpy()
    return found


def _received(inbox: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the count of tokens, int64 [], and the rows, [m, d], of `TextEncoder._send`."""
    return inbox[0].view(torch.uint8)[:_COUNT_BYTES].view(torch.int64)[0], inbox[1:]
