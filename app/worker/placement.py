"""Where a process computes: which cards CUDA shows it, and on which cores it runs.

Both are set before anything asks for a card: CUDA reads its variables once, when it is initialised,
and threads inherit the cores of the one that starts them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from app.domain import Device
from app.telemetry.cards import VISIBLE

_SYSFS = Path("/sys/bus/pci/devices")


def settle(device: Device) -> None:
    """Confine this process to *device*: its card and the cores near it, or a share of the cores."""
    see_only((device,))
    # torch then asks NVML whether there is a card, which does not initialise CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if device.threads:
        # The libraries' own pools; torch's is set by the engine.
        os.environ["OMP_NUM_THREADS"] = str(device.threads)
    if device.pci_id:
        cores = near_cores(device.pci_id, os.sched_getaffinity(0))
        if cores:
            with suppress(OSError):
                os.sched_setaffinity(0, cores)


def see_only(devices: Sequence[Device]) -> None:
    """Let CUDA show this process *devices* alone, in their order; without any, what it did."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if visible := ",".join(each.visible for each in devices if each.visible):
        os.environ[VISIBLE] = visible


def near_cores(pci_id: str, allowed: Collection[int], sysfs: Path = _SYSFS) -> frozenset[int]:
    """Return those of *allowed* that are on the card's NUMA node; none where nothing is known."""
    try:
        if int((sysfs / pci_id / "numa_node").read_text()) < 0:
            return frozenset()
        listed = (sysfs / pci_id / "local_cpulist").read_text()
        return frozenset(_cores(listed)) & frozenset(allowed)
    except (OSError, ValueError):
        return frozenset()


def _cores(text: str) -> set[int]:
    """Read the kernel's list, such as 0-3,8."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
