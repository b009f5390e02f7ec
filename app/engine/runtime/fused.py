"""The transformer and the text encoder at 8 bit: compiled, and replayed as CUDA graphs where that
pays.

A block is compiled once and serves all blocks of its kind, since weights are inputs of the compiled
code. It is compiled twice, at the default size and for every other size; after the warm-up nothing
is compiled any more (`app.engine.runtime.compile`). Small pictures and the text encoder do so little work
per kernel that the card waits for the processor: there the whole pass is recorded once per shape
and replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.memory.layer_stream import StreamedLayers
from app.engine.models.flux2_klein import TEXT_LAYERS
from app.engine.modules.rope import Rope
from app.engine.runtime.compile import Compiler
from app.engine.runtime.cuda_graphs import CudaGraphs, GraphPool
from app.engine.runtime.tokenizer import Tokens

_GRAPH_TOKENS = 2560
"""Up to so many tokens, prompt included, a pass waits for its launches rather than for its kernels.

"""

_PICTURE_STEPS = 4
"""A pass of the transformer is recorded in the second picture of its size."""


class FusedTransformer:
    """Predicts velocities. *shell* is diffusers' model with its blocks replaced by ours."""

    def __init__(self, shell: Any, compiler: Compiler, pool: GraphPool) -> None:
        self.shell = shell
        self._double = compiler.compile(_call)
        self._single = compiler.compile(_call_single)
        self._graphs = CudaGraphs(pool, is_on=compiler.has_graphs, after=_PICTURE_STEPS)

    def predict(
        self, tokens: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, rope: Rope
    ) -> torch.Tensor:
        """As `network.predict`."""
        inputs = (tokens, timestep, context, *rope)
        if tokens.shape[1] + context.shape[1] > _GRAPH_TOKENS:
            return self._run(*inputs)
        return self._graphs.run(self._run, inputs)

    def _run(
        self,
        tokens: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        shell = self.shell
        embedding = shell.time_guidance_embed(timestep.to(tokens.dtype) * 1000, None)
        image_modulation = shell.double_stream_modulation_img(embedding)
        text_modulation = shell.double_stream_modulation_txt(embedding)
        single_modulation = shell.single_stream_modulation(embedding)
        image, text = shell.x_embedder(tokens), context
        for block in shell.transformer_blocks:
            image, text = self._double(
                block, image, text, image_modulation, text_modulation, cos, sin
            )
        hidden = torch.cat([text, image], dim=1)
        for block in shell.single_transformer_blocks:
            hidden = self._single(block, hidden, single_modulation, cos, sin)
        hidden = shell.norm_out(hidden[:, context.shape[1] :], embedding)
        velocity: torch.Tensor = shell.proj_out(hidden)
        return velocity


class FusedTextEncoder(nn.Module):
    """The encoder's layers at 8 bit; the same face as `text_encoder.TextEncoder`."""

    def __init__(
        self,
        layers: nn.ModuleList,
        rotary: nn.Module,
        table: torch.Tensor,
        compiler: Compiler,
        pool: GraphPool,
        streamed_to: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layers: Iterable[nn.Module] = (
            layers if streamed_to is None else StreamedLayers(layers, streamed_to)
        )
        self.rotary = rotary
        self.table = table
        self._layer = compiler.compile(_call_layer)
        has_graphs = compiler.has_graphs and streamed_to is None
        self._graphs = CudaGraphs(pool, is_on=has_graphs, after=1)

    def forward(self, tokens: Tokens, device: torch.device) -> torch.Tensor:
        """Return the embeddings, of shape [1, tokens, 3 x hidden]."""
        hidden, mask = prepare(tokens, self.table, device)
        return self._graphs.run(self._run, (hidden, mask))

    def _run(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        cos, sin = self.rotary(hidden, positions)
        states = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = self._layer(layer, hidden, mask, cos, sin)
            if number in TEXT_LAYERS:
                states.append(hidden)
        return torch.cat(states, dim=-1)


def prepare(
    tokens: Tokens, table: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look the prompt's rows up on the host and bring them and the mask to the card."""
    length = tokens.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & tokens.mask.bool()[:, None, :]).unsqueeze(1)
    hidden = functional.embedding(tokens.ids, table)
    if device.type == "cuda":
        hidden, mask = hidden.pin_memory(), mask.pin_memory()
    return hidden.to(device, non_blocking=True), mask.to(device, non_blocking=True)


# Plain functions: one code object per kind of block is what the compiler keys its work by.


def _call(block: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = block(*inputs)
    return image, text


def _call_single(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = block(*inputs)
    return hidden


def _call_layer(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = layer(*inputs)
    return hidden
