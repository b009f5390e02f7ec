"""Attention: the transformer's kernels by name with the probe that selects one, and the VAE's."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from app.engine import torch_private
from app.engine.kernels import fp8_attention
from app.engine.models.entry import Architecture
from app.errors import StartupError

_log = logging.getLogger(__name__)

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes query, key and value, each [1, h, n, s], and returns the same shape and dtype."""

TOLERANCE = 0.08
"""The largest `relative_error` at which a kernel counts as correct."""

AUTO = "auto"
"""The value of `KLEIN_ATTENTION` that leaves the choice to the race, or to the order here."""

_HOPPER = (9, 0)
_PROBED_TOKENS = 640
_MOST_SCORES = 2**29
"""Of wide heads, at a time."""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """One way to compute attention; `/health` shows *name*."""

    name: str
    call: Attention
    fault: Callable[[torch.device], str]
    """Says why the kernel is not for a device, before it is tried; empty where it may be."""
    max_error: float = TOLERANCE
    """The largest `relative_error` against torch's own choice at which it counts as correct."""
    must_win: bool = False
    """Whether it is taken only where a race found it faster on the card, or by its name."""
    rate: str = "bf16"
    """The field of `roofline.GpuDatasheet` with the rate of its matmuls."""
    oldest: tuple[int, int] = (0, 0)
    """The compute capability from which on it usually runs."""
    newest: tuple[int, int] = (99, 0)
    """The one up to which it does."""


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with the SDPA backend that PyTorch selects."""
    return functional.scaled_dot_product_attention(q, k, v)


def _cudnn_fault(device: torch.device) -> str:
    if not torch_private.has_cudnn_attention():
        return "this torch does not offer it"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return "it is written for Hopper and newer"
    return ""


def _int8_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with comfy-kitchen: q, k, v and the probabilities quantized to int8."""
    made: torch.Tensor = torch.ops.comfy_kitchen.int8_attention(q, k, v, None)
    return made


def _int8_fault(device: torch.device) -> str:
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "comfy-kitchen is not installed"
    try:
        library = importlib.import_module("comfy_kitchen.sage_attention")
        if device.type == "cuda" and library.is_available(device):
            return ""
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("comfy-kitchen's attention does not load: %s", error)
    return "this comfy-kitchen does not offer it here"


KERNELS = {
    "torch": AttentionKernel("torch", plain_attention, lambda device: ""),
    "cudnn": AttentionKernel("cuDNN", torch_private.cudnn_attention, _cudnn_fault, oldest=_HOPPER),
    "int8": AttentionKernel(
        "comfy-kitchen in int8",
        _int8_attention,
        _int8_fault,
        max_error=0.03,
        must_win=True,
        rate="int8",
        oldest=(7, 5),
    ),
    # Half of its products are of bf16 and take two thirds of their time: it counts as bf16.
    "fp8": AttentionKernel(
        "probabilities and values in fp8",
        fp8_attention.attention,
        fp8_attention.fault,
        max_error=0.045,
        must_win=True,
        oldest=_HOPPER,
        newest=_HOPPER,
    ),
}
"""All kernels by name; without a race, the last that is right on a device is taken."""


def choose_attention(
    device: torch.device, architecture: Architecture, asked: str = AUTO
) -> AttentionKernel:
    """Return the kernel *asked* for, or the last without a fault that need not win a race.

    Raises:
        StartupError: the kernel *asked* for is not known, or does not run here for the heads of
            *architecture*.
    """
    check_attention(asked)
    if asked != AUTO:
        if fault := kernel_fault(KERNELS[asked], device, architecture):
            raise unusable(asked, fault)
        return KERNELS[asked]
    kernels = (each for each in reversed(KERNELS.values()) if not each.must_win)
    return next(each for each in kernels if not kernel_fault(each, device, architecture))


def choice_of(kernel: AttentionKernel) -> str:
    """Return what `KLEIN_ATTENTION` calls *kernel*."""
    return next(choice for choice, each in KERNELS.items() if each is kernel)


def unusable(asked: str, fault: str) -> StartupError:
    """Return the error for a kernel that was asked for and cannot run here."""
    return StartupError(
        f"KLEIN_ATTENTION asks for {asked}, which cannot be used: {fault}. Set "
        "KLEIN_ATTENTION=auto to take what runs here."
    )


def check_attention(asked: str) -> None:
    """Check a value of `KLEIN_ATTENTION`.

    Raises:
        StartupError: it is neither `auto` nor a kernel's name.
    """
    if asked not in (AUTO, *KERNELS):
        raise StartupError(
            "KLEIN_ATTENTION has a value that does not fit: Input should be "
            f"{', '.join(map(repr, (AUTO, *KERNELS)))}. Correct it and start again."
        )


def kernel_fault(kernel: AttentionKernel, device: torch.device, architecture: Architecture) -> str:
    """Return why *kernel* cannot be used on *device*: unsuited, failing or wrong; else empty."""
    if (fault := kernel.fault(device)) or kernel.call is plain_attention:
        return fault
    shape = (3, 1, architecture.heads, _PROBED_TOKENS, architecture.head_size)
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16)
    try:
        error = relative_error(kernel.call(q, k, v), plain_attention(q, k, v))
    except RuntimeError as failure:
        _log.info("%s's attention does not run here: %s", kernel.name, failure)
        return "it does not run here"
    return "" if error < kernel.max_error else f"its relative error is {error:.2g}"


def relative_error(made: torch.Tensor, right: torch.Tensor) -> float:
    """Return ||made - right|| / ||right||, computed in float32."""
    return float((made.float() - right.float()).norm() / right.float().norm())


def attend_wide(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Attend with one head as wide as diffusers' *attention*, 512: [1, n, c] -> the same.

    Without the last projection. Fused SDPA kernels support head sizes up to 256 or are slow beyond.
    Two matmuls and a softmax are several times faster, at the cost of materialising the attention
    scores: 0.5 GB at 1024x1024, less than the decoder's last layers take; 1 GB at most, in bf16,
    since more queries take turns.
    """
    query = attention.to_q(tokens) * attention.scale
    key = attention.to_k(tokens).transpose(1, 2)
    value = attention.to_v(tokens)
    parts = query.split(max(1, _MOST_SCORES // tokens.shape[1]), dim=1)
    return torch.cat([(part @ key).softmax(dim=-1) @ value for part in parts], dim=1)


class WideHeadProcessor:
    """A processor for diffusers' `Attention` that computes `attend_wide`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """Compute attention: [1, c, h, w] -> the same; diffusers passes the other three by name."""
        shape = hidden_states.shape
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # [1, h * w, c]
        out = attn.to_out[0](attend_wide(attn, tokens)).transpose(1, 2).reshape(shape)
        result: torch.Tensor = (out + hidden_states) / attn.rescale_output_factor
        return result
