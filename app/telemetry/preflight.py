"""The one check of the GPU, for the service, `klein doctor` and every other command.

It asks NVML, before anything heavy is imported: torch would report the same, but takes seconds to
import and answers with a traceback. What NVML does not report is left to the engine, which knows
the model and plans its memory.
"""

from __future__ import annotations

import importlib.util
import re
from enum import Enum, auto
from pathlib import Path

from app.errors import StartupError
from app.telemetry.cards import Cards
from app.telemetry.gpu import Gpu, GpuFacts

LEAST_FREE_BYTES = 4_500_000_000
"""Weights on the GPU in klein's smallest plan, without activations."""


MINIMUM_DRIVERS = {"11": 450, "12": 525, "13": 580}
"""Oldest driver per CUDA major version (https://docs.nvidia.com/deploy/cuda-compatibility/)."""


class GpuFault(Enum):
    """Why a GPU that is there cannot serve klein."""

    OLD_DRIVER = auto()
    LITTLE_MEMORY = auto()


def find_faults(gpu: GpuFacts, torch_cuda: str) -> dict[GpuFault, str]:
    """Return what is wrong with *gpu* for a torch built with CUDA *torch_cuda*, in sentences.

    A driver is too old where its CUDA major version is lower than that of torch's build. The minor
    version does not matter (CUDA's minor version compatibility,
    https://docs.nvidia.com/deploy/cuda-compatibility/).
    """
    faults = {}
    wanted = int(torch_cuda.partition(".")[0])
    if gpu.cuda is not None and gpu.cuda[0] < wanted:
        faults[GpuFault.OLD_DRIVER] = (
            f"The NVIDIA driver {gpu.driver} is too old: it knows CUDA "
            f"{gpu.cuda[0]}.{gpu.cuda[1]}, and torch here needs {wanted}.0 or later; "
            f"{mend_driver(torch_cuda, knows=gpu.cuda)}."
        )
    if gpu.free_bytes < LEAST_FREE_BYTES:
        who = ", ".join(
            f"{holder.name} (process {holder.pid}, {(holder.used_bytes or 0) / 1e9:.1f} GB)"
            for holder in gpu.holders
        )
        faults[GpuFault.LITTLE_MEMORY] = (
            f"{gpu.name} has {gpu.free_bytes / 1e9:.1f} GB free of {gpu.total_bytes / 1e9:.1f} GB "
            f"and at least {LEAST_FREE_BYTES / 1e9:.1f} GB are needed; it is held by "
            f"{who or 'processes that the driver does not name'}: close what is not needed, "
            "or set KLEIN_DEVICE."
        )
    return faults


def minimum_driver(torch_cuda: str) -> int:
    """Return the oldest driver major version for a torch built with CUDA *torch_cuda*."""
    return MINIMUM_DRIVERS.get(torch_cuda.partition(".")[0], MINIMUM_DRIVERS["13"])


def mend_driver(torch_cuda: str, *, knows: tuple[int, int] | None) -> str:
    """Return what to do about a driver that *knows* a CUDA too old for torch's *torch_cuda*.

    The part of a sentence; None stands for a driver too old to say what it knows.
    """
    newer = f"install NVIDIA's driver {minimum_driver(torch_cuda)} or newer"
    if knows is None:
        return newer
    return (
        f"{newer}, or another build of the same torch, for CUDA {knows[0]}.{knows[1]} or an "
        f"earlier {knows[0]}: PIP_EXTRA_INDEX_URL names an index that has one, as a build argument "
        "of the image or to pip (docs/container.md)"
    )


def check_driver(cards: Cards, torch_cuda: str | None) -> str:
    """Return *torch_cuda*, the CUDA version of torch's build, where it and a driver are there.

    Raises:
        StartupError: torch without CUDA, or no card that NVML knows.
    """
    if torch_cuda is None:
        raise StartupError(
            "The installed torch was built without CUDA; install the one that requirements.lock "
            "names, or set KLEIN_DEVICE=cpu."
        )
    if not cards.visible():
        raise StartupError(
            f"No NVIDIA card can be used on this machine: {cards.problem}. Install a driver and "
            "check it with nvidia-smi (in a container, pass the card in), or set KLEIN_DEVICE=cpu."
        )
    return torch_cuda


def check_gpu(gpu: Gpu, torch_cuda: str) -> str | None:
    """Say why a GPU cannot serve klein: too old a driver, or too little free memory."""
    facts = gpu.facts()
    # Where NVML cannot tell more, the engine will find out.
    if not isinstance(facts, GpuFacts):
        return None
    return next(iter(find_faults(facts, torch_cuda).values()), None)


def torch_cuda() -> str | None:
    """Read the CUDA version of torch's build without importing torch; None for a CPU build."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None
