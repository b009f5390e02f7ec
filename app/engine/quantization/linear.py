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
  cancels in the matmul. The fast kernel on sm_80 to sm_86 is comfy-kitchen's
  (`app.engine.quantization.int8_kernel`), and so the rotation is its too.

The memory layout is that of `nn.Linear`, [out, in] row-major: its transpose is the column-major
right operand that `_scaled_mm` needs. None of the networks' large layers has a bias.

Left out: scales per row for fp8 (accuracy hardly gains, and sm_89 may refuse it), fp4 and int4 (the
text encoder measurably loses the prompt), and torchao (its eager int8 reads values on the host,
which synchronizes the GPU).

Each class also runs without its kernel, with the same arithmetic in float32, so that the effect of
a precision on an image can be computed on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from app.engine import torch_private
from app.engine.checkpoint.files import QuantizedLayer
from app.engine.kernels import blocks
from app.engine.kernels.blocks import FP8_LIMIT, Cast
from app.engine.quantization.int8_kernel import Matmul, fused_matmul

_INT8_LIMIT = 127.0
_LEAST_FUSED = 16
"""The smallest rotation group of comfy-kitchen's kernels."""

_TINY = 1e-12
"""The least amax, against a division by zero."""

_EXACT_SUM = 1024
"""The sum of so many int8 products is at most 2 ** 24, which float32 represents exactly."""
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
        given = None if input_scale is None else input_scale.float().reshape(())
        self.input_scale = None if given is None else _parameter(given)
        self.input_inverse = None if given is None else _parameter(1 / given)

    @property
    def input_cast(self) -> Cast | None:
        """How `multiply` takes its input; None where its scale is not known before."""
        return None if self.input_inverse is None else Cast(self.input_inverse)

    def multiply(self, quantized: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply an input that `input_cast` made, to *dtype*: [..., in] -> [..., out]."""
        assert self.input_scale is not None
        return self._multiply(quantized, self.input_scale, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize *x* to fp8 and multiply: [..., in] -> [..., out], in the dtype of *x*."""
        if self.input_scale is not None and (cast := self.input_cast) is not None:
            return self._multiply(blocks.quantize(x, cast), self.input_scale, x.dtype)
        # A GPU divides by a scalar through its reciprocal, a CPU exactly. A difference in the last
        # bit would round all values half way between two fp8 numbers the other way.
        scale = blocks.amax(x).clamp(min=_TINY) * (1 / FP8_LIMIT)
        return self._multiply(blocks.quantize(x, Cast(1 / scale)), scale, x.dtype)

    def _multiply(
        self, quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        flat = quantized.reshape(-1, quantized.shape[-1])
        if flat.is_cuda:
            product = torch_private.scaled_mm(flat, self.weight, scale, self.scale, dtype)
        else:
            exact = flat.float() @ self.weight.float().t()
            product = (exact * (scale * self.scale)).to(dtype)
        return product.view(*quantized.shape[:-1], -1)


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

    On a GPU *product* computes it, where given: comfy-kitchen's fused kernel.
    """

    rotation: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        group: int,
        product: Matmul | None = None,
    ) -> None:
        super().__init__()
        self._group = group
        # klein has groups of 256 in every layer.
        self._product = product if group >= _LEAST_FUSED else None
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float())
        self.register_buffer("rotation", hadamard(group), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate and quantize the rows of *x*, multiply in int8, scale: [..., in] -> [..., out]."""
        if self._product is not None and x.is_cuda:
            return self._product(x, self.weight, self.scale, self._group)
        flat = rotate(x.reshape(-1, x.shape[-1]).float(), self.rotation)
        scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / _INT8_LIMIT
        quantized = (flat / scale).round().to(torch.int8)
        product = _int_mm(quantized, self.weight).float()
        return (product * scale * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize *weight* to fp8 (e4m3); return it and its float32 scale, []."""
    scale = weight.abs().amax().float().clamp(min=_TINY) / FP8_LIMIT
    quantized = (weight.float() / scale).clamp(-FP8_LIMIT, FP8_LIMIT)
    return quantized.to(torch.float8_e4m3fn), scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize *weight* to int8 by rows; return it and its float32 scales, [out]."""
    scale = weight.abs().amax(dim=1).float().clamp(min=_TINY) / _INT8_LIMIT
    quantized = (weight.float() / scale[:, None]).round()
    return quantized.to(torch.int8), scale


def quantize_rotated(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate *weight* along K, then quantize it as `quantize_int8` does."""
    rotation = hadamard(rotation_group(weight.shape[1])).to(weight.device)
    return quantize_int8(rotate(weight.float(), rotation))


def int8_linear(weight: torch.Tensor, scale: torch.Tensor) -> Int8Linear:
    """Build the int8 layer of a rotated and quantized weight, with the fused kernel if any."""
    product = fused_matmul() if torch.cuda.is_available() else None
    return Int8Linear(weight, scale, rotation_group(weight.shape[1]), product)


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


def hadamard(size: int) -> torch.Tensor:
    """Return the regular, orthonormal and symmetric Hadamard matrix of *size*, a power of four.

    Regular: all rows have the same sum, so a constant added to a group does not accumulate in one
    element (ConvRot, arXiv 2512.03673).
    """
    matrix, four = torch.ones(1, 1), 1 - 2 * torch.eye(4).flip(1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def rotate(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply each group of *rows*, [M, K], along K by *rotation*, [group, group]."""
    groups = rows.reshape(rows.shape[0], -1, len(rotation))
    return (groups @ rotation.to(rows.dtype)).reshape(rows.shape)


def _int_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply exactly: int8 [M, K] times the transpose of int8 [N, K] -> int32 [M, N]."""
    if not rows.is_cuda:
        return _int_mm_on_processor(rows, weight)
    count = rows.shape[0]
    if count <= 16:  # torch's kernel needs more than 16 rows on CUDA
        rows = functional.pad(rows, (0, 0, 0, 32 - count))
    return torch_private.int_mm(rows, weight)[:count]


def _int_mm_on_processor(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply in float32 in pieces along K, each short enough to be exact.

    Many times faster than integers on CPUs without int8 instructions.
    """
    pieces = zip(*(torch.split(each, _EXACT_SUM, 1) for each in (rows, weight)), strict=True)
    return torch.stack([(x.float() @ w.float().t()).int() for x, w in pieces]).sum(
        0, dtype=torch.int32
    )


def _parameter(value: torch.Tensor) -> nn.Parameter:
    # A parameter, not a plain tensor: `app.engine.memory.layer_stream` moves those.
    return nn.Parameter(value, requires_grad=False)
