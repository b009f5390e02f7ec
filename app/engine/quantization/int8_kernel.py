"""The fused int8 product of comfy-kitchen, where that library is installed (extra `int8`).

Rotating and rounding the input, the product and its scaling are two kernels there. By torch alone
they are eight, and an int32 product goes to memory and back. Knows no layers.
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
"""From x [..., K], int8 weight [N, K], float32 scales [N] and a rotation group to [..., N]."""

_PACKAGE = "comfy_kitchen"
# The library's numbers for the type of its answer.
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def is_installed() -> bool:
    """Whether the library is there; it is not imported for this."""
    return importlib.util.find_spec(_PACKAGE) is not None


@functools.cache
def fused_matmul() -> Matmul | None:
    """Import the library's product; None where it is missing or does not load."""
    if not is_installed():
        return None
    try:
        importlib.import_module(_PACKAGE)
        operation = torch.ops.comfy_kitchen.int8_linear
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("comfy-kitchen is installed and does not load: %s", error)
        return None

    def product(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group: int
    ) -> torch.Tensor:
        made: torch.Tensor = operation(x, weight, scale, None, _CODES[x.dtype], True, group)
        return made

    return product
