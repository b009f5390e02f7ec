"""Our fused blocks and layers, eager and as CUDA graphs.

Nothing is compiled for a size: the blocks launch kernels of which each is compiled once
(`app.engine.kernels`). Small images and the text encoder do so little work per kernel that launches
on the CPU are the bottleneck: there the whole pass is captured as a CUDA graph per shape and
replayed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from app.engine.memory.layer_stream import StreamedLayers
from app.engine.modules.fused_blocks import run_doubles, run_singles
from app.engine.modules.wide_encoder import settled
from app.engine.runtime.cuda_graphs import CudaGraphs, GraphPool
from app.engine.runtime.kernels_choice import KernelsChoice
from app.engine.runtime.networks import TextEncoder, Transformer


class FusedTransformer(Transformer):
    """Runs fused blocks in *network*; a pass of up to *graph_tokens* tokens becomes a graph.

    Without adapters the first step of a size is captured already: that takes as long as an eager
    step or two, and a replay is several times faster. A picture of one step alone would be made
    sooner without.
    """

    def __init__(
        self, network: Any, kernels: KernelsChoice, pool: GraphPool, graph_tokens: int
    ) -> None:
        super().__init__(network, run_doubles, run_singles)
        self._graphs = CudaGraphs(pool, is_on=kernels.has_graphs, after=1)
        self._graph_tokens = graph_tokens
        self._has_run = False

    def predict(
        self,
        tokens: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity, by a graph where the pass is short."""
        inputs = tokens, timestep, context, cos, sin
        is_long = tokens.shape[1] + context.shape[1] > self._graph_tokens
        if is_long or self._variant is None:
            velocity = super().predict(*inputs)
            self._has_run |= self._variant == ()
            return velocity
        rehearse = None if self._variant else self._rehearse
        return self._graphs.run(super().predict, inputs, self._variant, rehearse)

    def _rehearse(self, *inputs: torch.Tensor) -> None:
        """Do what a first call does that no capture allows: load, time and try kernels.

        Of the model that is all blocks, of a shape one of each kind: libraries choose by shapes.
        """
        self._pass(*inputs, is_sample=self._has_run)
        self._has_run = True


class FusedTextEncoder(TextEncoder):
    """Runs fused *layers* as a graph; with *streamed_to* they stay on the host and take turns."""

    def __init__(
        self,
        layers: nn.ModuleList,
        rotary: nn.Module,
        table: torch.Tensor,
        read: tuple[int, ...],
        kernels: KernelsChoice,
        pool: GraphPool,
        streamed_to: torch.device | None = None,
    ) -> None:
        places = layers if streamed_to is None else StreamedLayers(layers, streamed_to)
        super().__init__(places, rotary, table, read, _run_layer)
        has_graphs = kernels.has_graphs and streamed_to is None
        self._graphs = CudaGraphs(pool, is_on=has_graphs, after=1, has_static_inputs=True)

    def _encode(self, inbox: torch.Tensor) -> torch.Tensor:
        return self._graphs.run(super()._encode, (inbox,))

    def _settled(self, hidden: Any) -> torch.Tensor:
        return settled(hidden)


def _run_layer(layer: nn.Module, *inputs: Any) -> torch.Tensor:
    made: torch.Tensor = layer(*inputs)
    return made
