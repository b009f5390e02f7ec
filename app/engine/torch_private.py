"""Every private name of torch that this program uses, each with what is done where it is missing.

They have no public counterpart in torch 2.13, or one that takes another kernel. A name may go with
any version of torch; then the service goes on with less speed or more memory instead of failing.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch.nn import functional


def set_allocator(settings: str) -> None:
    """Set the CUDA allocator's *settings*, in the words of PYTORCH_ALLOC_CONF.

    Where neither private name does it, the variable is set, which torch reads when it first
    allocates.
    """
    # The second is the name before torch 2.13, which warns of it.
    names = (
        (torch._C, "_accelerator_setAllocatorSettings"),
        (torch.cuda.memory, "_set_allocator_settings"),
    )
    for owner, name in names:
        with contextlib.suppress(AttributeError, RuntimeError):
            getattr(owner, name)(settings)
            return
    os.environ["PYTORCH_ALLOC_CONF"] = settings


def scaled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `scaled_mm`, on a processor in float32."""
    if x.is_cuda:
        return scaled_mm(x, weight, x_scale, weight_scale, dtype)
    return (x.float() @ weight.float().t() * (x_scale * weight_scale)).to(dtype)


def scaled_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply fp8 [M, K] by the transpose of fp8 [N, K], times both scales [], to *dtype* [M, N].

    Without the private name, torch's public function of the same kernels.
    """
    if (multiply := getattr(torch, "_scaled_mm", None)) is not None:
        product: torch.Tensor = multiply(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale,
            out_dtype=dtype,
            use_fast_accum=True,
        )
        return product
    recipe = functional.ScalingType.TensorWise
    return functional.scaled_mm(
        x,
        weight.t(),
        x_scale,
        recipe,
        weight_scale,
        recipe,
        output_dtype=dtype,
        use_fast_accum=True,
    )


def int_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [M, K] by the transpose of int8 [N, K] exactly, to int32 [M, N].

    Without the private name, in float64, which is exact too and much slower.
    """
    if (multiply := getattr(torch, "_int_mm", None)) is not None:
        product: torch.Tensor = multiply(x, weight.t())
        return product
    return (x.double() @ weight.double().t()).int()


def spin(cycles: int) -> None:
    """Keep the GPU busy for *cycles* of its clock, while the host queues what is to be timed.

    Without the name, a timing also counts the host's time where that is longer.
    """
    if (wait := getattr(torch.cuda, "_sleep", None)) is not None:
        wait(cycles)


def has_cudnn_attention() -> bool:
    """Return whether torch offers cuDNN's attention by itself."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention")


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with cuDNN's kernel, where `has_cudnn_attention`.

    The public `sdpa_kernel` would silently take another kernel where this one does not run.
    """
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[
        0
    ]
    return result
