"""The fused int8 matmul of comfy-kitchen, where that library is installed.

Rotation and quantization of the input, the matmul and its scaling are two kernels there. With
PyTorch alone they are eight, and the int32 result goes to memory and back. It knows no layers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch

_log = logging.getLogger(__name__)

Matmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Maps x [..., K], int8 weight [N, K], float32 scales [N] and a rotation group to [..., N]."""

_PACKAGE = "comfy_kitchen"
# The library's codes of the output's dtype.
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def fused_matmul() -> Matmul | None:
    """Return the library's matmul; None where it is not installed or cannot be imported."""
    return _load()[0]


def why_missing() -> str:
    """Say why there is no fused matmul; return an empty string where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Matmul | None, str]:
    """Import the library, which takes a second; return its matmul, or None and the reason."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None, "comfy-kitchen is not installed"
    try:
        importlib.import_module(_PACKAGE)
        operation = torch.ops.comfy_kitchen.int8_linear
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("comfy-kitchen is installed and does not load.", exc_info=True)
        return None, f"comfy-kitchen is installed and does not load ({type(error).__name__})"

    def product(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group: int
    ) -> torch.Tensor:
        made: torch.Tensor = operation(x, weight, scale, None, _CODES[x.dtype], True, group)
        return made

    return product, ""
