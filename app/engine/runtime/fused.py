"""Forward passes of the 8-bit transformer and text encoder, compiled and as CUDA graphs.

All blocks of a kind share their compiled code, since weights are inputs of it. It is compiled
twice, with static shapes for the default size and with dynamic shapes for every other; nothing is
compiled after the warm-up (`app.engine.runtime.compile`). Small images and the text encoder do so
little work per kernel that launches on the CPU are the bottleneck: there the whole pass is captured
as a CUDA graph per shape and replayed.

Shapes: n image and reference tokens, m text tokens, d the hidden size.
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
"""Up to so many tokens, prompt included, a pass is bound by kernel launches, not by kernels."""

_PICTURE_STEPS = 4
"""Eager steps before a capture: a default image's, so the second image of a size is captured."""


class FusedTransformer:
    """Predicts velocities; *shell* is diffusers' model with its blocks replaced by fused ones."""

    def __init__(self, shell: Any, compiler: Compiler, pool: GraphPool) -> None:
        self.shell = shell
        self._double = compiler.compile(_call)
        self._single = compiler.compile(_call_single)
        self._graphs = CudaGraphs(pool, is_on=compiler.has_graphs, after=_PICTURE_STEPS)

    def predict(
        self, tokens: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, rope: Rope
    ) -> torch.Tensor:
        """Predict the velocity, as `app.engine.runtime.exact.transformer_forward` does."""
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
        image, text = shell.x_embedder(tokens), context  # [1, n, d], [1, m, d]
        for block in shell.transformer_blocks:
            image, text = self._double(
                block, image, text, image_modulation, text_modulation, cos, sin
            )
        hidden = torch.cat([text, image], dim=1)  # [1, m + n, d]
        for block in shell.single_transformer_blocks:
            hidden = self._single(block, hidden, single_modulation, cos, sin)
        hidden = shell.norm_out(hidden[:, context.shape[1] :], embedding)
        velocity: torch.Tensor = shell.proj_out(hidden)
        return velocity


class FusedTextEncoder(nn.Module):
    """The 8-bit text encoder, with the interface of `app.engine.runtime.exact.TextEncoder`."""

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
        """Return the prompt embeddings, [1, m, 3 * hidden size]."""
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
    """Embed *tokens* on the host and copy the result and the mask to *device*.

    Returns:
        The hidden states [1, m, hidden size] and the causal mask with padding, bool [1, 1, m, m].
    """
    length = tokens.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & tokens.mask.bool()[:, None, :]).unsqueeze(1)
    hidden = functional.embedding(tokens.ids, table)
    if device.type == "cuda":
        hidden, mask = hidden.pin_memory(), mask.pin_memory()
    return hidden.to(device, non_blocking=True), mask.to(device, non_blocking=True)


# Plain functions, since torch.compile caches by code object: one for each kind of block.


def _call(block: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = block(*inputs)
    return image, text


def _call_single(block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = block(*inputs)
    return hidden


def _call_layer(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = layer(*inputs)
    return hidden
