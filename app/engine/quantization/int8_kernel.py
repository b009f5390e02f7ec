"""Whose kernels compute an int8 layer on a GPU: comfy-kitchen's, or on Hopper ours.

Rotation and quantization of the input, the matmul and its scaling are two kernels in the library.
With PyTorch alone they are eight, and the int32 result goes to memory and back. The library also
takes in the SwiGLU before a layer, and the gate and residual after it, but no LayerNorm; ours all
that stands before a layer (`app.engine.kernels.int8_linear`). Nothing here knows layers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch

from app.engine.kernels import blocks, int8_linear
from app.engine.kernels.int8_linear import Operands, Weights

_log = logging.getLogger(__name__)

Product = Callable[[Weights, Operands], torch.Tensor]
"""Computes what `app.engine.kernels.int8_linear.multiply` does."""

_PACKAGE = "comfy_kitchen"
# The library's codes of the output's dtype.
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LEAST_GROUP = 16
"""The smallest rotation group of the library's kernels."""


def fused_product(weights: Weights) -> Product | None:
    """Return what computes a layer of *weights* on the GPU; None where nothing is fused there."""
    if not torch.cuda.is_available():
        return None
    device = weights.values.device
    device = device if device.type == "cuda" else torch.device("cuda")
    if int8_linear.fits(weights) and not int8_linear.fault(device):
        return _product
    return library_product() if weights.group >= _LEAST_GROUP else None


def _product(weights: Weights, operands: Operands) -> torch.Tensor:
    """Compute the product by our own kernels, or by what there is where they do not run."""
    if int8_linear.is_right(weights, operands):
        return int8_linear.multiply(weights, operands)
    if (product := library_product()) is not None:
        return product(weights, operands)
    rotation = int8_linear.hadamard(weights.group).to(weights.values.device)
    return int8_linear.emulate(weights, rotation, operands)


def library_product() -> Product | None:
    """Return the library's product; None where it is not installed or cannot be imported."""
    return _load()[0]


def why_missing() -> str:
    """Say why there is no fused matmul; return an empty string where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Product | None, str]:
    """Import the library, which takes a second; return its product, or None and the reason."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None, "comfy-kitchen is not installed"
    try:
        importlib.import_module(_PACKAGE)
        operation = torch.ops.comfy_kitchen.int8_linear
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("comfy-kitchen is installed and does not load.", exc_info=True)
        return None, f"comfy-kitchen is installed and does not load ({type(error).__name__})"

    def product(weights: Weights, operands: Operands) -> torch.Tensor:
        rows, before = _first_operand(operands)
        residual, gate = operands.addition or (None, None)
        made: torch.Tensor = operation(
            rows,
            weights.values,
            weights.scales,
            None,
            _CODES[rows.dtype],
            True,
            weights.group,
            before,
            None,
            0.0,
            residual,
            None if gate is None else gate.flatten(),
        )
        return made

    return product, ""


def _first_operand(operands: Operands) -> tuple[torch.Tensor, str | None]:
    """Return what the library multiplies, and what it does before: SwiGLU, alone, or nothing."""
    x, feed, modulation, _ = operands
    if x is None:
        return operands.given, "swiglu"
    if modulation is not None:
        x = blocks.norm_modulate(x, None, *modulation)[1]
    return x if feed is None else blocks.join(x.unsqueeze(1), feed), None
