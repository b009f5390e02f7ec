"""CUDA graphs of a function, one per input shape, in an LRU cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

_KEPT_GRAPHS = 4

_COUNTED_SHAPES = 64


GraphPool = Callable[[], Any]
"""Returns PyTorch's handle of the memory pool that a model's graphs share, created at the first
call; sharing is possible since no two graphs run at the same time."""


def new_pool() -> GraphPool:
    """Return a pool for the graphs of one model."""
    return cache(torch.cuda.graph_pool_handle)


class CudaGraphs:
    """CUDA graphs of one function by the shapes of its inputs, in an LRU cache.

    A shape is captured after *after* eager calls: what is called once is not captured, and a shape
    whose graph was evicted does not evict another at once. A call with a rehearsal waits for none.
    Results are copies, since the next replay of any graph in *pool* overwrites the graph's output.
    With *has_static_inputs* each call of a shape passes the same tensors, which the graph reads
    where they are.
    """

    def __init__(
        self, pool: GraphPool, *, is_on: bool, after: int, has_static_inputs: bool = False
    ) -> None:
        self._is_on = is_on
        self._has_static_inputs = has_static_inputs
        self._pool = pool
        self._after = after
        self._uses: OrderedDict[Hashable, int] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def run(
        self,
        function: Callable[..., torch.Tensor],
        inputs: tuple[torch.Tensor, ...],
        variant: Hashable = (),
        rehearse: Callable[..., object] | None = None,
    ) -> torch.Tensor:
        """Return function(*inputs), replayed from a graph where one exists for these shapes.

        *variant* is what the function's operations depend on besides. rehearse(*inputs) does what a
        shape's first call does and a capture must not; with it, the first call is captured.
        """
        key = variant, tuple(each.shape for each in inputs)
        graph = self._graphs.pop(key, None)
        if graph is None:
            if not self._is_on or (rehearse is None and not self._is_due(key)):
                return function(*inputs)
            if rehearse is not None:
                rehearse(*inputs)
            while len(self._graphs) >= _KEPT_GRAPHS:
                self._graphs.popitem(last=False)
            own = inputs if self._has_static_inputs else tuple(each.clone() for each in inputs)
            graph = _Graph(function, own, self._pool())
        self._graphs[key] = graph
        return graph.replay(inputs)

    def _is_due(self, key: Hashable) -> bool:
        """Count an eager call of a shape; return whether the shape is to be captured now."""
        count = self._uses.pop(key, 0)
        if count >= self._after:
            return True
        self._uses[key] = count + 1
        while len(self._uses) > _COUNTED_SHAPES:
            self._uses.popitem(last=False)
        return False


class _Graph:
    """One captured graph with its static *inputs* and output."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: tuple[torch.Tensor, ...],
        pool: Any,
    ) -> None:
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(*self._inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Copy *inputs* into the static ones, if they are others; replay; copy the output."""
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not given:
                own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output.clone()
