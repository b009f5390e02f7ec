"""Streams a network's layers from host memory: the next is copied while the current one computes.

Each layer is one contiguous pinned buffer on the host; two buffers on the GPU alternate. CUDA
events keep a copy from overwriting a layer that still computes, and a layer from starting before
its copy has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ALIGNMENT = 256


class StreamedLayers:
    """An iterable of the layers, each yielded when it is on *device*; all have the same shapes.

    Not thread-safe, one iteration at a time. On the CPU the same copies are made synchronously.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self._device = device
        self._lanes: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._host = [_flatten(layer, pin=device.type == "cuda") for layer in layers]
        self._stream = self._lanes.Stream(device) if device.type == "cuda" else torch.cpu.Stream()
        self._places = [
            torch.empty(len(self._host[0]), dtype=torch.uint8, device=device) for _ in range(2)
        ]
        self._modules = [layers[0], layers[1]]
        for module, place in zip(self._modules, self._places, strict=True):
            _lay_out(module, place)
        self._copied, self._used = ([self._lanes.Event() for _ in range(2)] for _ in range(2))

    def __iter__(self) -> Iterator[nn.Module]:
        for event in self._used:
            event.record()
        self._copy(0)
        for number in range(len(self._host)):
            if number + 1 < len(self._host):
                self._copy(number + 1)
            turn = number % 2
            self._lanes.current_stream().wait_event(self._copied[turn])
            yield self._modules[turn]
            self._used[turn].record()

    def _copy(self, number: int) -> None:
        turn = number % 2
        with self._lanes.stream(self._stream):
            self._stream.wait_event(self._used[turn])
            self._places[turn].copy_(self._host[number], non_blocking=True)
            self._copied[turn].record(self._stream)


def _flatten(layer: nn.Module, *, pin: bool) -> torch.Tensor:
    """Copy a layer's weights into one contiguous uint8 buffer, each aligned to 256 bytes."""
    total = sum(_padded(weight) for weight in layer.parameters())
    flat = torch.empty(total, dtype=torch.uint8, pin_memory=pin)
    start = 0
    for weight in layer.parameters():
        flat[start : start + weight.nbytes].copy_(weight.data.reshape(-1).view(torch.uint8))
        start += _padded(weight)
    return flat


def _lay_out(layer: nn.Module, place: torch.Tensor) -> None:
    """Make a layer's weights views of the uint8 buffer *place*."""
    start = 0
    for weight in layer.parameters():
        piece = place[start : start + weight.nbytes]
        weight.data = piece.view(weight.dtype).view(weight.shape)
        start += _padded(weight)


def _padded(weight: torch.Tensor) -> int:
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
