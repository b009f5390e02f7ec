"""Selects the precision, with a reason: a pure function of the request and the GPU's probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """A choice with its reason.

    *dtype* is that of everything that is not quantized. *linears* and *encoder_linears* are kinds
    of `app.engine.quantization.builder.QuantizedLinearBuilder`, or `exact` for the libraries' own
    modules.
    """

    name: str
    dtype: torch.dtype
    reason: str
    linears: str = "exact"
    encoder_linears: str = "exact"


@dataclass(frozen=True, slots=True)
class GpuCapabilities:
    """A GPU's compute capability (major, minor), and which kernels passed their probes."""

    capability: tuple[int, int]
    has_fp8: bool
    has_int8: bool
    int8_note: str = ""
    """Why *has_int8* is false, where it was probed."""


def choose_precision(asked: str, facts: GpuCapabilities | None, *, is_small: bool) -> Precision:
    """Choose for a model on a GPU, or on the CPU where *facts* is None.

    *is_small*: below a gigabyte of weights, as the demo and the tests' models are.
    """
    if asked in ("bf16", "fp32"):
        return Precision(asked, _DTYPES[asked], "as asked for")
    if facts is None:
        return _on_processor(asked, is_small=is_small)
    if asked == "int8":
        return _int8("as asked for")
    if asked == "fp8":
        return _fp8(facts, "as asked for")
    if is_small:
        return Precision("bf16", torch.bfloat16, "a small model, which 8 bit would not help")
    if facts.has_fp8:
        major, minor = facts.capability
        return _fp8(facts, f"sm_{major}{minor} multiplies in fp8, and the probe agreed with bf16")
    if facts.has_int8:
        return _int8("the card multiplies in int8 faster than in bf16; fp8 it does not know")
    note = f" (int8: {facts.int8_note})" if facts.int8_note else ""
    return _fp8(facts, f"for the memory{note}")


def vae_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the VAE's dtype: float32 on a CPU, else the precision's.

    Most CPUs have no bfloat16 convolution, and its emulation takes 80 times as long; the VAE is
    small enough for float32.
    """
    return torch.float32 if device.type == "cpu" else precision.dtype


def _on_processor(asked: str, *, is_small: bool) -> Precision:
    if asked == "fp8":
        return Precision(
            "fp8", _emulated(is_small), "emulated on the processor, to compare", "fp8", "int8w"
        )
    if asked == "int8":
        return Precision(
            "int8", _emulated(is_small), "emulated on the processor, to compare", "int8", "int8w"
        )
    if is_small:
        return Precision("fp32", torch.float32, "a small model, at its fastest on the processor")
    return Precision("bf16", torch.bfloat16, "on the processor, to halve the memory")


def _fp8(facts: GpuCapabilities, reason: str) -> Precision:
    if facts.has_fp8:
        return Precision("fp8", torch.bfloat16, reason, "fp8", "int8w")
    reason = f"{reason}; fp8 weights multiplied in bf16: this saves memory, not time"
    return Precision("fp8", torch.bfloat16, reason, "fp8w", "int8w")


def _int8(reason: str) -> Precision:
    return Precision("int8", torch.bfloat16, reason, "int8", "int8w")


def _emulated(is_small: bool) -> torch.dtype:
    return torch.float32 if is_small else torch.bfloat16


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
