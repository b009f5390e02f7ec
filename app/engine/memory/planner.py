"""Memory plans: what stays in GPU memory, and the largest image that then fits.

Pure arithmetic with reasons. Four plans, fastest first; the first whose default image fits is
taken.

    plan             weights in GPU memory                          VAE decode
    resident         all                                            whole
    resident tiled   all                                            in overlapping tiles
    streamed         all but the text encoder's, which is streamed  whole
    streamed tiled   all but the text encoder's, which is streamed  in overlapping tiles

The rates below were measured on an H200 at 1024x1024 with random weights (memory does not depend on
their values) and hold for every GPU; memory outside PyTorch's allocator is the CUDA context's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GB = 1_000_000_000


class Plan(StrEnum):
    """Where the networks are and how images are decoded; the value is the name that users see."""

    RESIDENT = "resident"
    RESIDENT_TILED = "resident tiled"
    STREAMED = "streamed"
    STREAMED_TILED = "streamed tiled"
    OFFLOAD = "offload"
    """Not quantized: one network at a time on the GPU."""
    HOST = "host"
    """Everything on the CPU."""

    @property
    def is_streamed(self) -> bool:
        """Whether the text encoder's layers pass through the GPU."""
        return self in {Plan.STREAMED, Plan.STREAMED_TILED}

    @property
    def is_tiled(self) -> bool:
        """Whether every image is decoded in tiles."""
        return self in {Plan.RESIDENT_TILED, Plan.STREAMED_TILED}


PLANS = (Plan.RESIDENT, Plan.RESIDENT_TILED, Plan.STREAMED, Plan.STREAMED_TILED)
"""The plans of quantized models, the fastest first."""

EXACT_PIXELS = 1_310_720
"""Larger images are decoded in tiles: the VAE's attention scores grow with the square."""

_TOKEN_PIXELS = 256
_TEXT_TOKENS = 512
_REFERENCE_TOKENS = 4096
_BASE_PIXELS = 1024 * 1024
_MULTIPLE = 64 * 64


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of each component's weights in GPU memory."""

    transformer: int
    encoder: int
    decoder: int
    image_encoder: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Working memory in bytes."""

    token: int
    """Per token of the transformer's sequence."""
    pixel: int
    """Per pixel of a whole decode."""
    encoded_pixel: int
    """Per pixel of a reference that is encoded."""
    tiles: int
    """Of a tiled decode at any size, besides the output itself."""
    text: int
    """Of the text encoder, besides its weights."""
    margin: int
    """Fragmentation of the allocator, and memory that CUDA graphs keep."""


COMPILED = Rates(
    token=83_000,
    pixel=1_280,
    encoded_pixel=1_500,
    tiles=440_000_000,
    text=300_000_000,
    margin=250_000_000,
)
EAGER = Rates(
    token=133_000,
    pixel=2_450,
    encoded_pixel=2_000,
    tiles=850_000_000,
    text=300_000_000,
    margin=300_000_000,
)
_EXACT_WORKING_BYTES = 4_000_000_000
"""Working memory of a one-megapixel image in bf16, eager, decoded without tiles."""

CONTEXT_BYTES = 600_000_000
"""Memory of the CUDA context, which PyTorch's allocator does not count."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A choice with its reasons; *max_pixels* by the number of references, 0 where none fit."""

    name: Plan
    reasons: tuple[str, ...]
    peak_bytes: int
    max_pixels: tuple[int, ...]


def peak_bytes(plan: Plan, weights: Weights, rates: Rates, pixels: int, references: int = 0) -> int:
    """Estimate the peak GPU memory of an image of *pixels*, in bytes."""
    resident = weights.transformer + weights.decoder + (0 if plan.is_streamed else weights.encoder)
    tokens = pixels // _TOKEN_PIXELS + _TEXT_TOKENS + references * _REFERENCE_TOKENS
    is_tiled = plan.is_tiled or pixels > EXACT_PIXELS
    stages = (
        rates.text + (2 * weights.encoder // 27 if plan.is_streamed else 0),
        rates.token * tokens,
        12 * pixels + (rates.tiles if is_tiled else rates.pixel * pixels),
        weights.image_encoder + rates.encoded_pixel * _BASE_PIXELS if references else 0,
    )
    return resident + max(stages) + rates.margin


def plan_memory(
    free_bytes: int,
    weights: Weights,
    rates: Rates,
    *,
    default_pixels: int,
    limit_pixels: int,
    max_references: int = 4,
    asked: str = "auto",
) -> MemoryPlan | None:
    """Choose the first plan whose default image fits; None where none does.

    A plan named by *asked* is returned even where its default image does not fit.
    """
    budget = free_bytes - CONTEXT_BYTES
    reasons = [f"{budget / GB:.1f} GB may be used ({free_bytes / GB:.1f} GB free)"]
    for name in PLANS if asked == "auto" else (Plan(asked),):
        peak = peak_bytes(name, weights, rates, default_pixels)
        if peak > budget and asked == "auto":
            reasons.append(f"{name} would need {peak / GB:.1f} GB")
            continue
        reasons.append(
            f"{name} needs {peak / GB:.1f} GB" + ("" if asked == "auto" else ", as asked for")
        )
        sizes = tuple(
            _largest(budget, name, weights, rates, limit_pixels, references)
            for references in range(max_references + 1)
        )
        return MemoryPlan(name, tuple(reasons), peak, sizes)
    return None


def plan_exact(
    free_bytes: int,
    weight_bytes: int,
    *,
    limit_pixels: int,
    max_references: int,
    offload: str = "auto",
) -> MemoryPlan:
    """Plan without quantization: all networks in GPU memory, or one at a time where they don't fit.

    *offload* is `KLEIN_OFFLOAD`'s value.
    """
    needed = weight_bytes + _EXACT_WORKING_BYTES
    sizes = (limit_pixels,) * (max_references + 1)
    numbers = f"all networks need {needed / GB:.1f} GB, free are {free_bytes / GB:.1f} GB"
    if offload in ("model", "disk"):
        return MemoryPlan(Plan.OFFLOAD, ("as asked for", numbers), needed, sizes)
    if offload == "none" or needed <= free_bytes:
        return MemoryPlan(Plan.RESIDENT, (numbers,), needed, sizes)
    return MemoryPlan(Plan.OFFLOAD, (f"one network at a time: {numbers}",), needed, sizes)


def _largest(
    budget: int, plan: Plan, weights: Weights, rates: Rates, limit: int, references: int
) -> int:
    """Find the most pixels, a multiple of 64 * 64, that fit *budget* bytes; 0 where none do."""
    low, high = 0, limit // _MULTIPLE
    while low < high:
        middle = (low + high + 1) // 2
        if peak_bytes(plan, weights, rates, middle * _MULTIPLE, references) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * _MULTIPLE
