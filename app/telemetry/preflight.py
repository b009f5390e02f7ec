"""Can the card be used at all? Asked of NVML before anything heavy is started.

torch would say the same, but it takes seconds to import and says it in a traceback. What NVML does
not tell is left to the engine, which knows the model and plans its memory.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from app.errors import StartupError
from app.telemetry.gpu import Gpu

LEAST_FREE_BYTES = 4_500_000_000
"""The weights of the smallest plan for klein, without anything to compute in."""


def check_gpu(gpu: Gpu, index: int, torch_cuda: str | None) -> None:
    """Refuse a card that cannot serve klein; *torch_cuda* is what torch was built for.

    Raises:
        StartupError: no driver, one too old, no such card, or too little free memory.
    """
    if torch_cuda is None:
        raise StartupError(
            "The installed torch was built without CUDA; install the one that requirements.lock "
            "names, or set KLEIN_DEVICE=cpu."
        )
    count = gpu.count()
    if count == 0:
        raise StartupError(
            "No NVIDIA driver answers on this machine; install one and check it with nvidia-smi "
            "(in a container, pass the card in), or set KLEIN_DEVICE=cpu."
        )
    if index >= count:
        raise StartupError(
            f"There is no card {index}; this machine has {count}, counted from 0. "
            "Set KLEIN_DEVICE to one of them."
        )
    _check_driver(gpu, torch_cuda)
    _check_memory(gpu)


def torch_cuda() -> str | None:
    """Read the CUDA version that torch was built for, without importing torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _check_driver(gpu: Gpu, torch_cuda: str) -> None:
    """A driver of the same major version or a later one does (CUDA's minor version
    compatibility)."""
    found = gpu.cuda_version()
    wanted = int(torch_cuda.partition(".")[0])
    if found is not None and found[0] < wanted:
        raise StartupError(
            f"The NVIDIA driver {gpu.driver_version()} is too old: it knows CUDA "
            f"{found[0]}.{found[1]}, and torch here needs {wanted}.0 or later; update the driver."
        )


def _check_memory(gpu: Gpu) -> None:
    now = gpu.read()
    if now is None:
        return
    free_bytes = now.total_bytes - now.used_bytes
    if free_bytes < LEAST_FREE_BYTES:
        holders = gpu.holders()
        who = ", ".join(
            f"{name} (process {pid}, {size / 1e9:.1f} GB)" for pid, name, size in holders
        )
        raise StartupError(
            f"{now.name} has {free_bytes / 1e9:.1f} GB free of {now.total_bytes / 1e9:.1f} GB and "
            f"at least {LEAST_FREE_BYTES / 1e9:.1f} GB are needed; it is held by "
            f"{who or 'processes that the driver does not name'}: close what is not needed, "
            "or set KLEIN_DEVICE."
        )
