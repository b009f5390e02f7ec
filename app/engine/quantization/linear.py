"""Linear layers with one-byte weights: the formats, their cost, and what was left out.

    format | weights             | activations     | matmul runs as      | for              | error
    -------|---------------------|-----------------|---------------------|------------------|-------
    fp8    | e4m3, one scale     | e4m3, one scale | fp8, `_scaled_mm`   | sm_89 and newer  | 3.75 %
    fp8w   | e4m3, one scale     | bf16            | bf16: half the      | sm_80 to sm_86,  | -
           |                     |                 | memory, no speed    | marked layers    |
    int8w  | int8, scale per row | bf16 or 16 bits | bf16 or int8 twice, | the text encoder | 1 %
           |                     |                 | then scaled         |                  |
    int8   | int8, rotated,      | int8, rotated,  | int8, comfy-kitchen | sm_80 to sm_86   | 1.3 %
           | scale per row       | scale per row   |                     |                  |

The error of fp8 was measured on synthetic data.

- fp8: one scale for the whole matrix, and one for x; the published file has both.
  With a static input scale the kernel that makes x quantizes it as it stores it
  (`app.engine.modules.ops`); without it the amax is computed first.
- fp8w: for GPUs without fp8 tensor cores, and for layers marked `full_precision_matrix_mult`.
- int8w: int8 values are exact in bf16 and the scale is applied to the matmul's result, so only the
  weights are quantized. The text encoder suffers from 8-bit activations: an error of 28 % at its
  output, against 8 %. Where a GPU is faster so, activations become 16 bits in two int8 terms
  (`app.engine.kernels.wide_int8`), which costs no more error than bf16.
- int8: the rows of w are quantized beforehand, the rows of x at each call. Plain quantization by
  rows fails on the outliers of a transformer's activations, so both are first rotated by a Hadamard
  matrix in groups along K (ConvRot, arXiv 2512.03673), which spreads an outlier over its group and
  cancels in the matmul. The fast kernel is comfy-kitchen's (`app.engine.quantization.int8_kernel`),
  and so the rotation is its too; on Hopper it is ours (`app.engine.kernels.int8_linear`).

The memory layout is that of `nn.Linear`, [out, in] row-major: its transpose is the column-major
right operand that `_scaled_mm` needs. None of the networks' large layers has a bias.

Left out: scales per row for fp8 (accuracy hardly gains, and sm_89 may refuse it), fp4 and int4 (the
text encoder measurably loses the prompt), and torchao (its eager int8 reads values on the host,
which synchronizes the GPU).

Each class also runs without its kernel, with the same arithmetic in float32, so that the effect of
a precision on an image can be computed on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from app.engine import torch_private
from app.engine.checkpoint.files import QuantizedLayer
from app.engine.kernels import blocks, fp8_gated
from app.engine.kernels.blocks import FP8_LIMIT, Cast
from app.engine.kernels.fp8_gated import Gated
from app.engine.kernels.fp8_linear import multiply_fp8
from app.engine.kernels.int8_linear import (
    TINY,
    Addition,
    Modulation,
    Operands,
    Weights,
    emulate,
    hadamard,
    rotate,
)
from app.engine.quantization.int8_kernel import Product, fused_product

_INT8_LIMIT = 127.0
# The rotation is a Kronecker power of a 4x4 matrix.
_GROUPS = (256, 64, 16, 4)


class Fp8Linear(nn.Module):
    """fp8 weights and activations; without *input_scale* the amax of x is computed at each call."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float().reshape(()))
        self._is_static = input_scale is not None
        # In one place for all calls, into which a kernel writes what it finds.
        found = torch.ones_like(self.scale) if input_scale is None else input_scale
        self.input_scale = _parameter(found.float().reshape(()))
        self.input_inverse = _parameter(1 / self.input_scale)

    @property
    def input_cast(self) -> Cast | None:
        """How `multiply` takes its input; None where its scale is not known before."""
        return Cast(self.input_inverse) if self._is_static else None

    def multiply(self, quantized: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply an input that `input_cast` made, to *dtype*: [..., in] -> [..., out]."""
        return multiply_fp8(quantized, self.weight, self.input_scale, self.scale, dtype)

    def gated(
        self, quantized: torch.Tensor, dtype: torch.dtype, taker: Fp8Linear, first: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Multiply to *dtype* up to output *first*; of the others, a feed, return *taker*'s input.

        [1, n, in] -> [1, n, first] and [1, n, in of *taker*], whose last columns are SwiGLU(feed)
        and the others not written yet. None where the kernel is not for it.
        """
        cast = taker.input_cast
        if cast is None:
            return None
        flat = quantized.reshape(-1, quantized.shape[-1])
        scales = self.input_scale, self.scale
        given = Gated(flat, self.weight[first:], *scales, cast.inverse)
        if not fp8_gated.is_for(given):
            return None
        width, inputs = len(given.weight) // 2, taker.weight.shape[1]
        rows = flat.new_empty(len(flat), inputs, dtype=cast.dtype)
        fp8_gated.multiply(given, rows[:, inputs - width :])
        made = flat.new_empty(len(flat), 0, dtype=dtype)
        if first:
            made = multiply_fp8(flat, self.weight[:first], *scales, dtype)
        return made.unsqueeze(0), rows.unsqueeze(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize *x* to fp8 and multiply: [..., in] -> [..., out], in the dtype of *x*."""
        if not self._is_static:
            blocks.find_scale(x, self.input_scale, self.input_inverse)
        return self.multiply(blocks.quantize(x, Cast(self.input_inverse)), x.dtype)


class WeightOnlyLinear(nn.Module):
    """fp8 or int8 weights, multiplied in the input's dtype; *scale* is [] or [out]."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the unscaled weights, then scale, in float32: [..., in] -> [..., out]."""
        product = functional.linear(x, self.weight.to(x.dtype))
        # In one pass: with one dimension at least, the scale is not rounded to the dtype of x.
        return product.mul_(self.scale.reshape(-1))


class Int8Linear(nn.Module):
    """int8 weights and activations, both rotated in groups of *group* along K.

    On a GPU *product* computes it, where given, with what stands around the layer in a block
    (`app.engine.modules.ops`); elsewhere the same arithmetic in float32.
    """

    rotation: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        group: int,
        product: Product | None = None,
    ) -> None:
        super().__init__()
        self._group = group
        self._product = product
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float())
        self.register_buffer("rotation", hadamard(group), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate and quantize the rows of *x*, multiply in int8, scale: [..., in] -> [..., out]."""
        return self._multiply(Operands(x))

    def modulated(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Multiply LayerNorm(x) * (1 + scale) + shift: [1, n, in] -> [1, n, out]."""
        return self._multiply(Operands(x, modulation=Modulation(scale, shift, eps)))

    def added(
        self,
        residual: torch.Tensor,
        gate: torch.Tensor,
        x: torch.Tensor | None,
        feed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return residual + gate * the product with [x, SwiGLU(feed)]: [1, n, out]."""
        return self._multiply(Operands(x, feed, addition=Addition(residual, gate)))

    def _multiply(self, operands: Operands) -> torch.Tensor:
        weights = Weights(self.weight, self.scale, self._group)
        if self._product is not None and self.weight.is_cuda:
            return self._product(weights, operands)
        return emulate(weights, self.rotation, operands)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize *weight* to fp8 (e4m3); return it and its float32 scale, []."""
    scale = weight.abs().amax().float().clamp(min=TINY) / FP8_LIMIT
    quantized = (weight.float() / scale).clamp(-FP8_LIMIT, FP8_LIMIT)
    return quantized.to(torch.float8_e4m3fn), scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize *weight* to int8 by rows; return it and its float32 scales, [out]."""
    scale = weight.abs().amax(dim=1).float().clamp(min=TINY) / _INT8_LIMIT
    quantized = (weight.float() / scale[:, None]).round()
    return quantized.to(torch.int8), scale


def quantize_rotated(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate *weight* along K, then quantize it as `quantize_int8` does."""
    rotation = hadamard(rotation_group(weight.shape[1])).to(weight.device)
    return quantize_int8(rotate(weight.float(), rotation))


def int8_linear(weight: torch.Tensor, scale: torch.Tensor) -> Int8Linear:
    """Build the int8 layer of a rotated and quantized weight, with the fused kernel if any."""
    group = rotation_group(weight.shape[1])
    return Int8Linear(weight, scale, group, fused_product(Weights(weight, scale, group)))


def plain_linear(weight: torch.Tensor) -> nn.Linear:
    """Build a layer that is not quantized."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = _parameter(weight)
    return layer


def fused_fp8(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the matmul of an `Fp8Linear` after one pass over x, which is what a block pays.

    There the operation before stores x quantized; the layer alone reads it once more.
    """
    assert isinstance(layer, Fp8Linear)
    weight, scale = layer.weight, layer.scale

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return torch_private.scaled_mm(x.to(torch.float8_e4m3fn), weight, scale, scale, x.dtype)

    return multiply


def take_fp8(layer: QuantizedLayer, device: torch.device) -> nn.Module:
    """Build the layer of a file's fp8 weight, which multiplies as the file asks."""
    if layer.is_full_precision or layer.weight_scale.numel() > 1:
        return take_fp8_weight(layer, device)
    given = None if layer.input_scale is None else layer.input_scale.to(device)
    return Fp8Linear(layer.weight(device), layer.weight_scale.to(device), given)


def take_fp8_weight(layer: QuantizedLayer, device: torch.device) -> nn.Module:
    """Build the layer of a file's fp8 weight that is multiplied in the input's dtype."""
    scale = layer.weight_scale.to(device)
    return WeightOnlyLinear(layer.weight(device), scale.reshape(-1) if scale.numel() > 1 else scale)


def rotation_group(width: int) -> int:
    """Return the largest rotation group that divides *width*."""
    return next(group for group in (*_GROUPS, 1) if width % group == 0)


def _parameter(value: torch.Tensor) -> nn.Parameter:
    # A parameter, not a plain tensor: `app.engine.memory.layer_stream` moves those.
    return nn.Parameter(value, requires_grad=False)
