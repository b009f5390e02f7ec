"""One optimisation step, small enough in overhead for 27 tiny layers.

All weights live in one flat vector: full-precision masters, and a copy in the computing precision
of which the modules' parameters are views. So a whole AdamW step with clipping and averaging is a
dozen kernels, and every number that changes from step to step is a tensor: on a card the step is
captured once in a CUDA graph and replayed. Where capture fails, the same step runs plainly.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
# A step's losses by a batch; the first is the one to descend, the others are for the log.
LossFunction = Callable[[Batch], tuple[Tensor, Tensor]]

_ALIGNMENT = 64
_BETAS = (0.9, 0.98)
_DECAY = 0.01
_CLIP = 1.0


class FlatWeights:
    """Parameters as one vector, with AdamW's state and a running average beside it.

    Owned by one training loop. `rate` and `averaging` are set between steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        """`compute` is the precision of the modules' copy; the device's own where left out."""
        self.parameters = list(parameters)
        offsets, size = _offsets(self.parameters)
        compute = compute or compute_type(device)
        self._places = list(zip(offsets, self.parameters, strict=True))
        self.master = torch.zeros(size, device=device)
        self._working = torch.zeros(size, device=device, dtype=compute)
        self._gradient = torch.zeros(size, device=device, dtype=compute)
        self._mean, self._square = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self._decayed = torch.zeros_like(self.master)
        self._steps = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)
        self.averaging = torch.zeros((), device=device)
        for offset, parameter in self._places:
            part = slice(offset, offset + parameter.numel())
            self.master[part] = parameter.detach().float().flatten().to(device)
            self._decayed[part] = float(parameter.ndim > 1)
            parameter.data = self._working[part].view(parameter.shape)
        self.average = self.master.clone()
        self._gradients = [
            self._gradient[offset : offset + parameter.numel()].view(parameter.shape)
            for offset, parameter in self._places
        ]
        self._working.copy_(self.master)

    def descend(self, loss: Tensor) -> Tensor:
        """One AdamW step on the loss's gradient; returns the gradient's norm."""
        gradients = torch.autograd.grad(loss, self.parameters)
        torch._foreach_copy_(self._gradients, list(gradients))
        gradient = self._gradient.float()
        norm: Tensor = gradient.norm()
        gradient = gradient * (_CLIP / (norm + 1e-6)).clamp(max=1.0)
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient * gradient, 1 - _BETAS[1])
        mean = self._mean / (1 - _BETAS[0] ** self._steps)
        spread = (self._square / (1 - _BETAS[1] ** self._steps)).sqrt() + 1e-8
        change = mean / spread + _DECAY * self._decayed * self.master
        self.master.sub_(self.rate * change)
        self.average.lerp_(self.master, 1 - self.averaging)
        self._working.copy_(self.master)
        return norm

    def set_averaging(self, step: int, horizon: float) -> None:
        """Average over the last `horizon` steps, and over fewer at the beginning."""
        self.averaging.fill_(min(1 - 1 / horizon, (1 + step) / (10 + step)))

    def load(self, values: list[Tensor]) -> None:
        """Go on from saved weights: the optimiser and the average start anew."""
        for (offset, parameter), value in zip(self._places, values, strict=True):
            self.master[offset : offset + parameter.numel()] = value.flatten().to(self.master)
        self.average.copy_(self.master)
        self._working.copy_(self.master)

    def settle(self) -> None:
        """End the training: the parameters become the average, in full precision, on their own."""
        for (_, parameter), value in zip(self._places, self.split(self.average), strict=True):
            parameter.data = value.clone()

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector as tensors of the parameters' shapes."""
        return [flat[o : o + p.numel()].view(p.shape) for o, p in self._places]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the modules compute with the average for a while."""
        self._working.copy_(self.average)
        try:
            yield
        finally:
            self._working.copy_(self.master)


def compute_type(device: torch.device) -> torch.dtype:
    """The precision in which a device computes: bfloat16 where it has instructions for it."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def _offsets(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    offsets, size = [], 0
    for parameter in parameters:
        offsets.append(size)
        size += math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT
    return offsets, size


class Stepper:
    """Runs one kind of step on batches of one shape: captured on a card, plainly elsewhere."""

    def __init__(
        self,
        weights: FlatWeights,
        loss: LossFunction,
        *,
        pool: Any = None,
        simpler: Callable[[], bool] = lambda: False,
    ) -> None:
        """`pool` is the graph memory that all steppers of a training share; None is no capture.

        Sharing is safe since steps run one after the other and results are read before the next.
        `simpler` may make the loss easier to capture after a failure; true means: try again.
        """
        self._weights, self._loss, self._pool, self._simpler = weights, loss, pool, simpler
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Batch = {}
        self._results: Tensor | None = None

    def step(self, batch: Batch) -> Tensor:
        """Take one step; returns a device tensor of the losses and the gradient's norm."""
        if self._pool is not None and self._graph is None:
            while not self._is_captured(batch) and self._simpler():
                _log.warning("CAPTURE IS TRIED AGAIN WITHOUT THE COMPILER")
            if self._graph is None:
                _log.warning("THE STEP RUNS PLAINLY AND SLOWLY FROM HERE")
                self._pool = None
        if self._graph is None:
            return self._run(batch)
        for name, value in batch.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        assert self._results is not None
        return self._results

    def _run(self, batch: Batch) -> Tensor:
        loss, details = self._loss(batch)
        norm = self._weights.descend(loss)
        return torch.cat((details.detach().float(), norm.reshape(1)))

    def _is_captured(self, batch: Batch) -> bool:
        self._inputs = {name: value.clone() for name, value in batch.items()}
        try:
            self._warm_up()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._results = self._run(self._inputs)
        except Exception:
            _log.exception("THE STEP WAS NOT CAPTURED")
            torch.cuda.synchronize()
            return False
        self._graph = graph
        _log.info("captured a step of %s", {n: tuple(v.shape) for n, v in batch.items()})
        return True

    def _warm_up(self) -> None:
        """Run on a side stream as capture demands, with a rate of zero: nothing is learnt twice."""
        rate = self._weights.rate.clone()
        self._weights.rate.zero_()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no type there
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._weights.rate.copy_(rate)


class RunningFigures:
    """Sums of step results on the device, read only when a line is written."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, result: Tensor) -> None:
        """Take in one step's figures."""
        self._sum = result.clone() if self._sum is None else self._sum + result
        self._count += 1

    def take(self) -> list[float]:
        """The averages since the last call."""
        if self._sum is None:
            return []
        averages: list[float] = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return averages
