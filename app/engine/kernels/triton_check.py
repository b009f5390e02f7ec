"""What kernels share: where they run, the sides of tiles, and how many programs run."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch

from app.engine import error_mapping

_log = logging.getLogger(__name__)

_HOPPER = (9, 0)
_refusal = [""]


@cache
def power_of_two(size: int) -> int:
    """Return the least power of two that is not below *size*, as the side of a tile must be."""
    return 1 << (size - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors *device* has, as many programs as a persistent kernel has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Return whether *device* is one of Hopper's, for which some kernels are written alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER


def runs(launch: Callable[[], None], kernel: str) -> bool:
    """Launch a *kernel* for the first time; that it does not run is logged, and False."""
    try:
        launch()
    # Triton's errors have no common base, and the C compiler's are those of `subprocess`.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("%s does not run here.", kernel, exc_info=True)
        return False
    return True


def raise_unrelated(error: Exception) -> None:
    """Raise *error* again where it says nothing of the kernel that was tried.

    That is a lack of memory, and a CUDA context that cannot be used further.
    """
    if error_mapping.is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        raise error


def triton_fault() -> str:
    """Say why no kernel of Triton runs on the current GPU; empty where one did, which is tried."""
    return _refusal[0] or _try_triton()


def refuse(reason: str) -> None:
    """Let no kernel be launched, for *reason*; an empty one allows all that run."""
    _refusal[0] = reason


@cache
def _try_triton() -> str:
    """Launch a kernel.

    Triton needs a C compiler and a folder from which code can be run, and each GPU its own
    assembler; whether all are there shows when something is launched. The folder must be set
    before (`app.engine.runtime.kernels_choice`).
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing"
    try:
        kernels = importlib.import_module("app.engine.kernels.blocks_triton")
        made = torch.zeros(1, device="cuda")
        kernels.amax[(1,)](torch.full((16,), -2.0, device="cuda"), made, 16, BLOCK=16)
    # Triton's errors have no common base, and the C compiler's are those of `subprocess`.
    except Exception as error:
        raise_unrelated(error)
        _log.warning("Triton's kernels do not run here.", exc_info=True)
        return f"Triton's kernels do not run here ({type(error).__name__})"
    return "" if made.item() == 2 else "Triton's kernels compute something else here"
