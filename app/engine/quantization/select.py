"""Selects the precision, with a reason: a pure function of the request and the GPU's probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from app.engine.quantization.formats import AUTO, FORMATS, WeightFormat, automatic, check_choice
from app.errors import StartupError


@dataclass(frozen=True, slots=True)
class Precision:
    """A choice with its reason.

    *name* is what the operator calls it, *linears* the format that the transformer's layers get on
    this GPU. *dtype* is that of everything that is not quantized.
    """

    name: str
    dtype: torch.dtype
    reason: str
    linears: WeightFormat

    @property
    def encoder_linears(self) -> WeightFormat:
        """The format of the text encoder's layers."""
        return FORMATS[self.linears.encoder]


@dataclass(frozen=True, slots=True)
class GpuCapabilities:
    """A GPU's compute capability (major, minor), and the formats whose kernels were probed."""

    capability: tuple[int, int]
    runs: frozenset[str]
    """Formats whose probes passed; those after the first of them are not probed."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Why others do not run."""
    fastest: str = ""
    """The format that a race chose among them; empty where none was held."""
    told: str = ""
    """What the race says for its choice."""
    broken: Mapping[str, str] = field(default_factory=dict)
    """Why formats cannot be used here, not even by name."""


def choose_precision(asked: str, facts: GpuCapabilities | None, *, is_small: bool) -> Precision:
    """Choose for a model on a GPU, or on the CPU where *facts* is None.

    *is_small*: below a gigabyte of weights, as the demo and the tests' models are.

    Raises:
        StartupError: *asked* is not one of `formats.choices`, or its kernel is wrong on this GPU.
    """
    check_choice(asked)
    if asked != AUTO:
        return _as_asked(FORMATS[asked], facts, is_small=is_small)
    if facts is None:
        if is_small:
            return _choice("fp32", "a small model, at its fastest on the processor")
        return _choice("bf16", "on the processor, to halve the memory")
    if is_small:
        return _choice("bf16", "a small model, which 8 bit would not help")
    if facts.fastest:
        return _choice(facts.fastest, facts.told)
    for each in automatic():
        if each.reason and each.name in facts.runs:
            return _choice(each.name, each.reason.format(*facts.capability))
    wanted = next(each for each in FORMATS.values() if each.substitute)
    others = [f"{name}: {why}" for name, why in facts.faults.items() if name != wanted.name]
    return _substitute(wanted, "for the memory" + (f" ({'; '.join(others)})" if others else ""))


def vae_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the VAE's dtype: float32 on a CPU, else the precision's.

    Most CPUs have no bfloat16 convolution, and its emulation takes 80 times as long; the VAE is
    small enough for float32.
    """
    return torch.float32 if device.type == "cpu" else precision.dtype


def _as_asked(wanted: WeightFormat, facts: GpuCapabilities | None, *, is_small: bool) -> Precision:
    if facts is None and not wanted.is_exact:
        dtype = torch.float32 if is_small else torch.bfloat16
        return Precision(wanted.name, dtype, "emulated on the processor, to compare", wanted)
    if facts is not None and (fault := facts.broken.get(wanted.name)):
        raise StartupError(
            f"KLEIN_PRECISION asks for {wanted.name}, which cannot be used: {fault}. Set "
            "KLEIN_PRECISION=auto to take what runs here."
        )
    if facts is not None and wanted.substitute and wanted.name not in facts.runs:
        return _substitute(wanted, "as asked for")
    return _choice(wanted.name, "as asked for")


def _choice(name: str, reason: str) -> Precision:
    return Precision(name, getattr(torch, FORMATS[name].dtype), reason, FORMATS[name])


def _substitute(wanted: WeightFormat, reason: str) -> Precision:
    assert wanted.substitute is not None
    taken = FORMATS[wanted.substitute]
    reason = f"{reason}; {wanted.name} weights multiplied in bf16: this saves memory, not time"
    return Precision(wanted.name, getattr(torch, taken.dtype), reason, taken)
