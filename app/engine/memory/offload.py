"""Which network is on the card now, where they do not all stay.

Weights wait in host memory and are copied in before their stage; leaving costs nothing, since the
copy on the host was never given up. That is what `enable_model_cpu_offload` does, without the way
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offloader:
    """Puts networks on the card, to stay or for a stage. The engine's thread alone uses it.

    With *pin* waiting weights are kept in pinned memory: copies are three times as fast, but the
    memory cannot be swapped out, nor be a file's.
    """

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self._device = device
        self._pin = pin and device.type == "cuda"
        self._waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def admit(self, network: nn.Module, *, stays: bool) -> None:
        """Take *network*, whose weights are on the host, under control."""
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
        """Have *network* on the card within the block."""
        pairs = self._waiting.get(id(network), ())
        for tensor, host in pairs:
            tensor.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in pairs:
                tensor.data = host
