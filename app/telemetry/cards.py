"""The cards that this process may use: NVML's list, as CUDA_VISIBLE_DEVICES leaves it.

A number counts in PCI order, as `nvidia-smi` does; everything else goes by UUID. CUDA counts the
fastest first unless told otherwise, and only what is visible, so its numbers are used nowhere: a
worker sees its own card alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from app.domain import Device
from app.telemetry.gpu import CACHE_S, Gpu, import_nvml, text

_log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"

Board = Sequence[Device]
"""A card as it sits in its slot: itself alone, or the parts that it is divided into (MIG)."""


class Cards:
    """Lists cards at the first question; *load_nvml* and *cache_s* are as for `Gpu`."""

    def __init__(
        self,
        *,
        load_nvml: Callable[[], Any] = import_nvml,
        environ: Mapping[str, str] = os.environ,
        cache_s: float = CACHE_S,
    ) -> None:
        self._load_nvml = load_nvml
        self._environ = environ
        self._cache_s = cache_s
        self._visible: tuple[Device, ...] | None = None
        self.problem = ""
        """Why no card is visible."""

    def visible(self) -> tuple[Device, ...]:
        """Return the cards that can be used; none without a driver."""
        if self._visible is None:
            try:
                self._visible = self._list()
            except Exception as error:
                self.problem = str(error).lower()
                self._visible = ()
        return self._visible

    def find(self, name: str) -> Device | str:
        """Return the card with a number, a UUID or its beginning, or a PCI id; else say why not."""
        cards = self.visible()
        if self.problem:
            return self.problem
        if name.isdigit():
            found = list(cards[int(name) :][:1])
        else:
            found = [card for card in cards if name == card.pci_id or card.uuid.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            return f"{name} stands for {len(found)} cards; name one by its whole UUID"
        who = f"{VISIBLE} leaves" if VISIBLE in self._environ else "this machine has"
        return f"there is no card {name}; {who} {len(cards)}, counted from 0"

    def open(self, device: Device) -> Gpu:
        """Return *device*'s reader."""
        key = device.uuid or device.index or 0
        return Gpu(key, load_nvml=self._load_nvml, cache_s=self._cache_s)

    def _list(self) -> tuple[Device, ...]:
        nvml = self._load_nvml()
        nvml.nvmlInit()
        boards = list(_boards(nvml))
        found = select(boards, self._environ.get(VISIBLE))
        if not found:
            self.problem = f"{VISIBLE} leaves no card" if any(boards) else "there is no card"
        return tuple(replace(each, index=index) for index, each in enumerate(found))


def select(boards: Sequence[Board], visible: str | None) -> list[Device]:
    """Return what CUDA would show of *boards* where *visible* is CUDA_VISIBLE_DEVICES.

    As in CUDA the list ends at the first entry that stands for no card, and a card that is named
    twice leaves none.
    """
    if visible is None:
        return [device for board in boards for device in board]
    found: list[Device] = []
    for entry in visible.split(","):
        device = _match(boards, entry.strip())
        if device is None:
            break
        if device in found:
            return []
        found.append(device)
    return found


def _match(boards: Sequence[Board], entry: str) -> Device | None:
    if number := re.match("[0-9]+", entry):
        # Of a card that is divided CUDA shows the first part.
        return next(iter(next(iter(boards[int(number[0]) :]), ())), None)
    found = [device for board in boards for device in board if _begins(device.uuid, entry)]
    return found[0] if len(found) == 1 else None


def _begins(uuid: str, entry: str) -> bool:
    return entry.startswith(("GPU-", "MIG-")) and uuid.startswith(entry)


def _boards(nvml: Any) -> Iterator[Board]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield _board(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError as error:
            _log.warning("NVML knows of a card %d that cannot be used: %s.", index, error)


def _board(nvml: Any, board: Any) -> Board:
    name = text(nvml.nvmlDeviceGetName(board))
    pci_id = _as_kernel_writes(text(nvml.nvmlDeviceGetPciInfo(board).busId))
    devices = []
    for part in _parts(nvml, board):
        uuid = text(nvml.nvmlDeviceGetUUID(part))
        total_bytes = None
        with suppress(nvml.NVMLError):
            total_bytes = int(nvml.nvmlDeviceGetMemoryInfo(part).total)
        devices.append(
            Device(None, name, uuid, total_bytes=total_bytes, visible=uuid, pci_id=pci_id)
        )
    return devices


def _parts(nvml: Any, board: Any) -> list[Any]:
    """Return the handles of the parts that a card is divided into, else its own alone."""
    try:
        is_divided = bool(nvml.nvmlDeviceGetMigMode(board)[0])
    except nvml.NVMLError:
        is_divided = False
    if not is_divided:
        return [board]
    parts = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(board)):
        with suppress(nvml.NVMLError):
            parts.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(board, index))
    return parts


def _as_kernel_writes(bus_id: str) -> str:
    """Return a PCI id with four digits of the domain, of which NVML gives eight, in lower case."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"
