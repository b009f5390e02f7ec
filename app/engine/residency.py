"""Which network is on the card now, where they do not all fit at once.

Weights wait in host memory and are copied in before their stage; leaving costs nothing, since the
copy on the host was never given up. That is what `enable_model_cpu_offload` does, without the way
back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Residency:
    """Moves whole networks in and out; with *is_resident* it does nothing, for all are on the card.

    The engine's thread alone uses it.
    """

    def __init__(self, device: torch.device, *, is_resident: bool) -> None:
        self._device = device
        self._is_resident = is_resident
        self._waiting: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def admit(self, network: nn.Module, *, pin: bool = False) -> None:
        """Take *network*, whose weights are on the host, under control; *pin* makes copies fast."""
        if self._is_resident:
            network.to(self._device)
            return
        pairs = []
        for tensor in [*network.parameters(), *network.buffers()]:
            host = tensor.data.pin_memory() if pin else tensor.data
            tensor.data = host
            pairs.append((tensor, host))
        self._waiting[id(network)] = pairs

    @contextmanager
    def on_card(self, network: nn.Module) -> Iterator[None]:
        """Have *network* on the card within the block."""
        pairs = self._waiting.get(id(network), ())
        for tensor, host in pairs:
            tensor.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in pairs:
                tensor.data = host
