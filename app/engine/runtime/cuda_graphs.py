"""CUDA graphs: one recorded pass per input shape, the last few kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

_KEPT_GRAPHS = 4

_COUNTED_SHAPES = 64


class GraphPool:
    """The memory that all graphs of a model share, since no two of them ever run at once."""

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self) -> Any:
        """Return torch's name for it, made at the first graph."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class CudaGraphs:
    """CUDA graphs of one function by the shapes of its inputs, the last few kept.

    A shape is recorded once it was used *after* times: the first picture must not wait, and a shape
    whose graph had to go does not push out another's at once. Results are copies, for the next
    replay of any graph of *pool* overwrites the graph's own.
    """

    def __init__(self, pool: GraphPool, *, is_on: bool, after: int) -> None:
        self._is_on = is_on
        self._pool = pool
        self._after = after
        self._uses: OrderedDict[tuple[torch.Size, ...], int] = OrderedDict()
        self._graphs: OrderedDict[tuple[torch.Size, ...], _Graph] = OrderedDict()

    def run(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Call *function*, or replay what it did."""
        key = tuple(each.shape for each in inputs)
        graph = self._graphs.pop(key, None)
        if graph is None:
            if not self._is_on or not self._is_due(key):
                return function(*inputs)
            while len(self._graphs) >= _KEPT_GRAPHS:
                self._graphs.popitem(last=False)
            graph = _Graph(function, inputs, self._pool.handle())
        self._graphs[key] = graph
        return graph.replay(inputs)

    def _is_due(self, key: tuple[torch.Size, ...]) -> bool:
        """Count a use of a shape without a graph."""
        count = self._uses.pop(key, 0)
        if count >= self._after:
            return True
        self._uses[key] = count + 1
        while len(self._uses) > _COUNTED_SHAPES:
            self._uses.popitem(last=False)
        return False

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()


class _Graph:
    """One recorded pass."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: tuple[torch.Tensor, ...],
        pool: Any,
    ) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(*self._inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run the recorded pass on *inputs*."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output.clone()
