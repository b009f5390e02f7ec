"""Memory plans: what stays in GPU memory, and the largest image that then fits.

Pure arithmetic with reasons. Four plans, fastest first; the first whose default image fits is
taken.

    plan             weights in GPU memory                          VAE decode
    resident         all                                            whole
    resident tiled   all                                            in overlapping tiles
    streamed         all but the text encoder's, which is streamed  whole
    streamed tiled   all but the text encoder's, which is streamed  in overlapping tiles

The rates of an architecture (`app.engine.models.entry.Rates`) hold for every GPU; memory outside
PyTorch's allocator is the CUDA context's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from app.engine.models.entry import Architecture, Rates

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

_MULTIPLE = 64 * 64


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of each component's weights in GPU memory."""

    transformer: int
    encoder: int
    decoder: int
    image_encoder: int
    adapters: int = 0
    """What is kept free for adapters."""


CONTEXT_BYTES = 600_000_000
"""Memory of the CUDA context, which PyTorch's allocator does not count."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A choice with its reasons; *max_pixels* by the number of references, 0 where none fit."""

    name: Plan
    reasons: tuple[str, ...]
    peak_bytes: int
    max_pixels: tuple[int, ...]


def peak_bytes(
    plan: Plan,
    weights: Weights,
    architecture: Architecture,
    rates: Rates,
    pixels: int,
    references: int = 0,
) -> int:
    """Estimate the peak GPU memory of an image of *pixels*, in bytes."""
    resident = weights.transformer + weights.adapters + weights.decoder
    if not plan.is_streamed:
        resident += weights.encoder
    image_tokens = pixels // architecture.token_pixels + references * architecture.reference_tokens
    decoded = pixels
    if pixels > architecture.exact_pixels:
        decoded = (architecture.large_tile * architecture.latent_side) ** 2
    stages = (
        rates.text
        + (2 * weights.encoder // architecture.text_layers[-1] if plan.is_streamed else 0),
        rates.token * (image_tokens + architecture.prompt_tokens),
        12 * pixels + (rates.tiles if plan.is_tiled else rates.pixel * decoded),
        weights.image_encoder + rates.encoded_pixel * architecture.reference_pixels
        if references
        else 0,
    )
    return resident + max(stages) + rates.margin


def plan_memory(
    free_bytes: int,
    weights: Weights,
    architecture: Architecture,
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
        peak = peak_bytes(name, weights, architecture, rates, default_pixels)
        if peak > budget and asked == "auto":
            reasons.append(f"{name} would need {peak / GB:.1f} GB")
            continue
        reasons.append(
            f"{name} needs {peak / GB:.1f} GB" + ("" if asked == "auto" else ", as asked for")
        )
        sizes = tuple(
            _largest(budget, name, weights, architecture, rates, limit_pixels, references)
            for references in range(max_references + 1)
        )
        return MemoryPlan(name, tuple(reasons), peak, sizes)
    return None


def plan_exact(
    free_bytes: int,
    weight_bytes: int,
    working_bytes: int,
    *,
    limit_pixels: int,
    max_references: int,
    offload: str = "auto",
) -> MemoryPlan:
    """Plan without quantization: all networks in GPU memory, or one at a time where they don't fit.

    *offload* is `KLEIN_OFFLOAD`'s value.
    """
    needed = weight_bytes + working_bytes
    sizes = (limit_pixels,) * (max_references + 1)
    numbers = f"all networks need {needed / GB:.1f} GB, free are {free_bytes / GB:.1f} GB"
    if offload in ("model", "disk"):
        return MemoryPlan(Plan.OFFLOAD, ("as asked for", numbers), needed, sizes)
    if offload == "none" or needed <= free_bytes:
        return MemoryPlan(Plan.RESIDENT, (numbers,), needed, sizes)
    return MemoryPlan(Plan.OFFLOAD, (f"one network at a time: {numbers}",), needed, sizes)


def _largest(
    budget: int,
    plan: Plan,
    weights: Weights,
    architecture: Architecture,
    rates: Rates,
    limit: int,
    references: int,
) -> int:
    """Find the most pixels, a multiple of 64 * 64, that fit *budget* bytes; 0 where none do."""
    low, high = 0, limit // _MULTIPLE
    while low < high:
        middle = (low + high + 1) // 2
        pixels = middle * _MULTIPLE
        if peak_bytes(plan, weights, architecture, rates, pixels, references) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * _MULTIPLE
