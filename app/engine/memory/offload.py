"""Model offloading: which components are in GPU memory now.

Weights of an offloaded component are copied to the GPU before its stage and dropped there after it;
the host keeps its copy, so nothing is copied back, unlike with diffusers'
`enable_model_cpu_offload`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offloader:
    """Puts networks on the GPU, permanently or for a stage. Not thread-safe.

    With *pin*, offloaded weights are in pinned memory: copies are three times as fast, but it can
    neither be swapped out nor be memory-mapped from a file.
    """

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self._device = device
        self._pin = pin and device.type == "cuda"
        self._waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def admit(self, network: nn.Module, *, stays: bool) -> None:
        """Register *network*, whose weights are on the host; with *stays* move it to the device."""
        if stays:
            network.to(self._device)
            return
        pairs = []
        for tensor in [*network.parameters(), *network.buffers()]:
            host = tensor.data.pin_memory() if self._pin else tensor.data
            tensor.data = host
            pairs.append((tensor, host))
        self._waiting[id(network)] = pairs

    @contextmanager
    def on_gpu(self, network: object) -> Iterator[None]:
        """Keep *network* on the device within the `with` block."""
        pairs = self._waiting.get(id(network), ())
        for tensor, host in pairs:
            tensor.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in pairs:
                tensor.data = host
