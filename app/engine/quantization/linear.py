"""Linear layers whose weights take one byte: what each is for, what it costs, what was left out.

The formats fp8      w = fp8 (e4m3) times one scale for the whole matrix; x is divided by its own
scale, rounded to fp8 too, and the product runs on the fp8 units (`_scaled_mm`, sm_89 and newer).
The published file brings both scales. With the input's scale known beforehand the rounding is one
elementwise pass that a compiler melts into the operation before; without it the largest magnitude
is looked up first. Synthetic error 3.75 %. fp8w     the same weights, multiplied in bfloat16: half
the memory, no speed. For cards whose units know no fp8 (sm_80 to sm_86), and for layers marked
`full_precision_matrix_mult`. int8w    one byte and one scale per row, multiplied in bfloat16. int8
values are exact in bfloat16 and the scale is applied to the product, so only the weights are
rounded: 1 %. For the text encoder, which suffers from rounded activations (28 % at its output,
against 8 %). int8     both sides int8: rows of w beforehand, rows of x as they come. Plain rounding
by rows fails on the outliers of a transformer's activations, so both are first rotated by a
Hadamard matrix in groups along K (ConvRot), which spreads an outlier over its group and cancels in
the product. Error 1.3 %. The fast product on sm_80 to sm_86 is comfy-kitchen's (fused_int8), and
so the rotation is its too.

The memory layout is that of `nn.Linear`, [out, in] row by row: its transpose is the column-major
right side that `_scaled_mm` wants. There are no biases in any of the networks' large layers.

Left out: scales per row for fp8 (accuracy hardly gains, and sm_89 may refuse it), fp4 and int4 (the
text encoder measurably loses the prompt), and torchao (its eager int8 looks at values, a stop of
the card).

Each class also runs without its kernel, by the same arithmetic in float32, so that a processor can
say what a precision does to a picture.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from app.engine.quantization.int8_kernel import Matmul, fused_matmul

FP8_LIMIT = 448.0
"""The largest finite value of float8_e4m3fn."""

_INT8_LIMIT = 127.0
_LEAST_FUSED = 16
_TINY = 1e-12
_EXACT_SUM = 1024
"""So many products of two int8 add up to at most 2 ** 24, which float32 holds exactly."""
# The rotation is a power of the matrix of four.
_GROUPS = (256, 64, 16, 4)


class Fp8Linear(nn.Module):
    """fp8 times fp8; *input_scale* None looks the largest magnitude up at every call."""

    input_inverse: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.weight_scale = _parameter(weight_scale.float().reshape(()))
        self.input_scale: nn.Parameter | None = None
        self.input_inverse = None
        if input_scale is not None:
            scale = input_scale.float().reshape(())
            self.input_scale = _parameter(scale)
            self.input_inverse = _parameter(1 / scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round *x* to fp8 and multiply."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.input_scale is None or self.input_inverse is None:
            # A card divides by a plain number through its inverse, a processor exactly. A last bit
            # of difference here turns all values that lie half way between two of fp8's around.
            scale = flat.abs().amax().clamp(min=_TINY) * (1 / FP8_LIMIT)
            inverse = 1 / scale
        else:
            scale, inverse = self.input_scale, self.input_inverse
        rounded = (flat * inverse).clamp(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn)
        if x.is_cuda:
            product = torch._scaled_mm(
                rounded,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.weight_scale,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        else:
            exact = rounded.float() @ self.weight.float().t()
            product = (exact * (scale * self.weight_scale)).to(x.dtype)
        return product.view(*x.shape[:-1], -1)


class WeightOnlyLinear(nn.Module):
    """One-byte weights (fp8 or int8) multiplied in the input's precision; *scale* is [] or
    [out].
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the bare weights and scale the product.

        Scaled in float32: inductor takes a product scaled in the weights' own precision for its
        processor kernel `_weight_int8pack_mm`, whose lowering fails on a card.
        """
        product = functional.linear(x, self.weight.to(x.dtype))
        return (product.float() * self.scale).to(x.dtype)


class Int8Linear(nn.Module):
    """int8 times int8 after a rotation of both sides in groups of *group* along K.

    On a card by *product*, where there is one.
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
        # Its kernels rotate no smaller groups than these; klein has 256 in every layer.
        self._product = product if group >= _LEAST_FUSED else None
        self.weight = _parameter(weight)
        self.scale = _parameter(scale.float())
        self.register_buffer("rotation", hadamard(group), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate and round the rows of *x*, multiply in integers, scale."""
        if self._product is not None and x.is_cuda:
            return self._product(x, self.weight, self.scale, self._group)
        flat = rotate(x.reshape(-1, x.shape[-1]).float(), self.rotation)
        scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / _INT8_LIMIT
        rounded = (flat / scale).round().to(torch.int8)
        product = _int_mm(rounded, self.weight).float()
        return (product * scale * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round *weight* to fp8 with one scale; return both."""
    scale = weight.abs().amax().float().clamp(min=_TINY) / FP8_LIMIT
    rounded = (weight.float() / scale).clamp(-FP8_LIMIT, FP8_LIMIT)
    return rounded.to(torch.float8_e4m3fn), scale


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the rows of *weight* to int8; return them and a scale for each."""
    scale = weight.abs().amax(dim=1).float().clamp(min=_TINY) / _INT8_LIMIT
    rounded = (weight.float() / scale[:, None]).round()
    return rounded.to(torch.int8), scale


def rotated_int8(weight: torch.Tensor) -> Int8Linear:
    """Build the int8 layer of a full-precision *weight*."""
    group = rotation_group(weight.shape[1])
    rotated = rotate(weight.float(), hadamard(group).to(weight.device))
    return int8_linear(*quantize_int8(rotated))


def int8_linear(weight: torch.Tensor, scale: torch.Tensor) -> Int8Linear:
    """Build the int8 layer of rows that were rotated and rounded, by the best product there is."""
    product = fused_matmul() if torch.cuda.is_available() else None
    return Int8Linear(weight, scale, rotation_group(weight.shape[1]), product)


def rotation_group(width: int) -> int:
    """Choose the largest group that divides *width*."""
    return next(group for group in (*_GROUPS, 1) if width % group == 0)


def hadamard(size: int) -> torch.Tensor:
    """Build the regular orthonormal Hadamard matrix of a power of four: its own transpose.

    Regular: all rows have the same sum, so a constant added to a group does not gather in one place
    (ConvRot, arXiv 2512.03673).
    """
    matrix, four = torch.ones(1, 1), 1 - 2 * torch.eye(4).flip(1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def rotate(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate each group of *rows* along K."""
    groups = rows.reshape(rows.shape[0], -1, len(rotation))
    return (groups @ rotation.to(rows.dtype)).reshape(rows.shape)


def _int_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply exactly, int8 [M, K] times int8 [N, K] to int32 [M, N]."""
    if not rows.is_cuda:
        return _int_mm_on_processor(rows, weight)
    count = rows.shape[0]
    if count <= 16:  # fewer the card's kernel does not take
        rows = functional.pad(rows, (0, 0, 0, 32 - count))
    return torch._int_mm(rows, weight.t())[:count]


def _int_mm_on_processor(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As sums in float32, each so short that it is exact: processors without instructions for bytes
    multiply these many times faster.
    """
    pieces = zip(*(torch.split(each, _EXACT_SUM, 1) for each in (rows, weight)), strict=True)
    return torch.stack([(x.float() @ w.float().t()).int() for x, w in pieces]).sum(
        0, dtype=torch.int32
    )


def _parameter(value: torch.Tensor) -> nn.Parameter:
    # A parameter, not a plain tensor: the compiler then takes its shape for fixed.
    return nn.Parameter(value, requires_grad=False)
