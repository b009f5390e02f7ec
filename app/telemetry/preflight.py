"""Check through NVML whether the GPU can be used, before anything heavy is imported.

torch would report the same, but takes seconds to import and answers with a traceback. What NVML
does not report is left to the engine, which knows the model and plans its memory.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from app.errors import StartupError
from app.telemetry.gpu import Gpu

LEAST_FREE_BYTES = 4_500_000_000
"""Weights on the GPU in klein's smallest plan, without activations."""


def check_gpu(gpu: Gpu, index: int, torch_cuda: str | None) -> None:
    """Refuse a GPU that cannot serve klein; *torch_cuda* is the CUDA version of torch's build.

    Raises:
        StartupError: torch without CUDA, no driver or too old a one, no such GPU, or too little
            free memory.
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
    """Read the CUDA version of torch's build without importing torch; None for a CPU build."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _check_driver(gpu: Gpu, torch_cuda: str) -> None:
    """Refuse a driver whose CUDA major version is lower than that of torch's build.

    The minor version does not matter (CUDA's minor version compatibility,
    https://docs.nvidia.com/deploy/cuda-compatibility/).
    """
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
