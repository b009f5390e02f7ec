"""Preview what the service will choose on a GPU: precision, memory plan, peak, roofline.

The choices are the engine's own (`app.engine.quantization.select`, `app.engine.memory.planner`),
asked with klein's published sizes in place of a checkpoint, so a GPU that is not installed can be
previewed too.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.domain import ModelSpec
from app.engine import roofline
from app.engine.memory.planner import (
    CONTEXT_BYTES,
    MemoryPlan,
    Plan,
    Weights,
    plan_memory,
)
from app.engine.models.registry import files_for, find_model
from app.settings import Settings

DISPLAY_BYTES = 2_000_000_000
"""Memory assumed in use on a GPU that is not installed: display, browser, driver."""

KLEIN_WEIGHTS = Weights(
    transformer=4_070_000_000,
    encoder=2_730_000_000,
    decoder=99_200_000,
    image_encoder=68_900_000,
)
"""Bytes of klein 4B at 8 bit.

Transformer: 3.68 G parameters of the blocks at 1 byte and 0.195 G others at 2. Text encoder: 27
layers at 1 byte. VAE encoder and decoder: 2 bytes.
"""

_FP8 = (8, 9)
_INT8 = (8, 0)


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to plan for, found or assumed; *has_fp8* and *has_int8*: those kernels run on it."""

    capability: tuple[int, int]
    free_bytes: int
    has_fp8: bool
    has_int8: bool
    can_compile: bool = True
    spec: roofline.GpuDatasheet | None = None


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """The choices and their reasons; *plan* is None where no plan fits."""

    precision: str
    precision_reason: str
    plan: MemoryPlan | None
    floor_s: float | None
    """Roofline seconds of one image at the model's defaults; None without a datasheet."""


def assume(spec: roofline.GpuDatasheet) -> Target:
    """Return a target of this datasheet: a display attached, the usual kernels working."""
    return Target(
        capability=spec.capability,
        free_bytes=spec.memory_bytes - DISPLAY_BYTES,
        has_fp8=spec.capability >= _FP8,
        has_int8=_INT8 <= spec.capability < _FP8,
        spec=spec,
    )


def preview_plan(target: Target, settings: Settings, model: ModelSpec) -> PlanPreview:
    """Return what the engine would choose for klein on *target*.

    Raises:
        StartupError: this GPU cannot run the precision that the settings name.
    """
    # Imports torch, so only where a preview is needed.
    from app.engine.quantization.select import GpuCapabilities, choose_precision

    facts = GpuCapabilities(target.capability, target.has_fp8, target.has_int8)
    chosen = choose_precision(settings.precision, facts, is_small=False)
    limit = min(settings.max_pixels, model.max_pixels)
    architecture = find_model(model.id).architecture
    if chosen.linears == "exact":
        plan: MemoryPlan | None = _plan_exact(target, settings, model, limit)
    else:
        plan = plan_memory(
            target.free_bytes,
            KLEIN_WEIGHTS,
            architecture,
            architecture.compiled if target.can_compile else architecture.eager,
            default_pixels=model.default_width * model.default_height,
            limit_pixels=limit,
            max_references=model.max_references,
            asked=settings.plan,
        )
    kind = "bf16" if chosen.linears == "fp8w" else chosen.name
    return PlanPreview(chosen.name, chosen.reason, plan, floor_seconds(target.spec, kind, model))


def floor_seconds(
    spec: roofline.GpuDatasheet | None, precision: str, model: ModelSpec
) -> float | None:
    """Return roofline seconds at the model's defaults; None for an unknown GPU or precision."""
    if spec is None:
        return None
    found = roofline.roofline(
        find_model(model.id).architecture,
        spec,
        precision,
        model.default_width,
        model.default_height,
        model.default_steps,
        branches=2 if model.default_guidance > 1 else 1,
    )
    return found.total_s if found else None


def _plan_exact(target: Target, settings: Settings, model: ModelSpec, limit: int) -> MemoryPlan:
    """Plan without 8-bit weights: all networks on the GPU, or one at a time."""
    entry = find_model(model.id)
    files = files_for(entry, "bf16")
    weights = sum(file.size_bytes for file in files if file.path.endswith(".safetensors"))
    needed = weights * (2 if settings.precision == "fp32" else 1)
    needed += entry.architecture.working_bytes
    sizes = (limit,) * (model.max_references + 1)
    numbers = (
        f"all networks need {needed / 1e9:.1f} GB, free are "
        f"{(target.free_bytes - CONTEXT_BYTES) / 1e9:.1f} GB"
    )
    fits = needed <= target.free_bytes
    is_resident = settings.offload == "none" or (settings.offload == "auto" and fits)
    return MemoryPlan(Plan.RESIDENT if is_resident else Plan.OFFLOAD, (numbers,), needed, sizes)
