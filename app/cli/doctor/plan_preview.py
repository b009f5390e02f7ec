"""Preview what the service will choose on a GPU: precision, memory plan, peak, roofline.

The choices are the engine's own (`app.engine.quantization.select`, `app.engine.memory.planner`),
asked with klein's published sizes in place of a checkpoint, so a GPU that is not installed can be
previewed too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.domain import ModelSpec
from app.engine import roofline
from app.engine.adapters.shapes import linear_shapes, slot_bytes
from app.engine.memory.planner import (
    CONTEXT_BYTES,
    MemoryPlan,
    Weights,
    plan_exact,
    plan_memory,
)
from app.engine.models.entry import Architecture
from app.engine.models.registry import MODELS, files_for, find_model
from app.engine.quantization.formats import FORMATS, WeightFormat, automatic
from app.engine.race.results import Lap, Results, choose, wrong
from app.settings import Settings

_HOPPER_LINEARS, _HOPPER_ATTENTION = 0.75, 0.42
"""Of the peak in int8: 1,496 of 1,979 TFLOP/s for a matmul of 4608 x 3072 x 27648 on an H100 by our
kernel, 833 by comfy-kitchen's; its attention reached less."""

DISPLAY_BYTES = 2_000_000_000
"""Memory assumed in use on a GPU that is not installed: display, browser, driver."""


OTHERS_BYTES = 390_000_000
"""The transformer's weights outside its blocks, which no format rounds."""


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to plan for, found or assumed; *runs* names the formats whose kernels run on it."""

    capability: tuple[int, int]
    free_bytes: int
    runs: tuple[str, ...]
    has_kernels: bool = True
    spec: roofline.GpuDatasheet | None = None
    race: Results | None = None
    """What was timed, or computed of the datasheet; None where *runs* alone decides."""
    lora_rank: int = 0
    """The rank of adapters that memory is planned for."""


@dataclass(frozen=True, slots=True)
class PlanPreview:
    """The choices and their reasons; *plan* is None where no plan fits."""

    precision: str
    precision_reason: str
    plan: MemoryPlan | None
    floor_s: float | None
    """Roofline seconds of one image at the model's defaults; None without a datasheet."""
    linears: str
    """The format of the transformer's layers."""
    attention: str = ""
    """The attention kernel that a race chose; empty where none was held."""


def assume(spec: roofline.GpuDatasheet) -> Target:
    """Return a target of this datasheet: a display attached, the usual kernels working."""
    usual = [each.name for each in automatic() if spec.capability >= each.oldest]
    return Target(
        capability=spec.capability,
        free_bytes=spec.memory_bytes - DISPLAY_BYTES,
        runs=tuple(usual[:1]),
        spec=spec,
        race=compute_race(spec, find_model(next(iter(MODELS))).architecture),
    )


def compute_race(spec: roofline.GpuDatasheet, architecture: Architecture) -> Results:
    """Compute a race from a datasheet: FLOPs of a step's parts, divided by the peak rates.

    On Hopper kernels in int8 count with the share of the peak that was measured there: ours for
    linear layers use its own instructions, comfy-kitchen's for attention do not.
    """
    from app.engine.modules.attention import KERNELS

    tokens = architecture.step_tokens
    blocks = architecture.double_blocks + architecture.single_blocks
    linears = sum(2 * tokens * x.inputs * x.outputs * x.count for x in architecture.matmuls)
    attention = 4 * tokens**2 * architecture.width * blocks

    def timed(lap: Lap, flops: float, kind: str | None, hopper: float, *, is_known: bool) -> Lap:
        rate = getattr(spec, kind or "bf16")
        if rate is None or not is_known:
            return replace(lap, fault="this card does not know it")
        share = hopper if kind == "int8" and spec.capability == (9, 0) else 1.0
        return replace(lap, seconds=flops / (rate * share))

    return Results(
        spec.capability,
        tuple(
            timed(
                Lap(each.name, must_win=each.must_win, is_reference=each.reason is None),
                linears,
                each.rate,
                _HOPPER_LINEARS,
                is_known=spec.capability >= each.oldest,
            )
            for each in (*automatic(), FORMATS["bf16"])
        ),
        tuple(
            timed(
                Lap(name, is_challenger=each.must_win),
                attention,
                each.rate,
                _HOPPER_ATTENTION,
                is_known=each.oldest <= spec.capability <= each.newest,
            )
            for name, each in reversed(KERNELS.items())
        ),
        is_computed=True,
    )


def preview_plan(target: Target, settings: Settings, model: ModelSpec) -> PlanPreview:
    """Return what the engine would choose for klein on *target*.

    Raises:
        StartupError: this GPU cannot run the precision that the settings name.
    """
    # Imports torch, so only where a preview is needed.
    from app.engine.modules.attention import check_attention, unusable
    from app.engine.quantization.select import GpuCapabilities, choose_precision

    check_attention(settings.attention)
    facts, attention = GpuCapabilities(target.capability, frozenset(target.runs)), ""
    if target.race is not None:
        from app.engine.race.measure import capabilities

        for lap in target.race.attention:
            if lap.name == settings.attention and (fault := wrong(lap)):
                raise unusable(lap.name, fault)
        winner = choose(target.race, settings.engine_precision, settings.attention)
        facts, attention = capabilities(target.race, winner), winner.attention
    chosen = choose_precision(settings.engine_precision, facts, is_small=False)
    limit = min(settings.max_pixels, model.max_pixels)
    architecture = find_model(model.id).architecture
    adapters = slot_bytes(linear_shapes(architecture), target.lora_rank)
    if chosen.linears.is_exact:
        plan: MemoryPlan | None = plan_exact(
            # The engine looks once its CUDA context is there.
            target.free_bytes - CONTEXT_BYTES,
            _exact_bytes(model, chosen.linears) + adapters,
            architecture.working_bytes,
            limit_pixels=limit,
            max_references=model.max_references,
            offload=settings.offload,
        )
    else:
        plan = plan_memory(
            target.free_bytes,
            replace(klein_weights(chosen.linears), adapters=adapters),
            architecture,
            architecture.with_kernels if target.has_kernels else architecture.without_kernels,
            default_pixels=model.default_width * model.default_height,
            limit_pixels=limit,
            max_references=model.max_references,
            asked=settings.plan,
        )
    return PlanPreview(
        chosen.name,
        chosen.reason,
        plan,
        floor_seconds(target.spec, chosen.linears.name, model),
        chosen.linears.name,
        attention="" if chosen.linears.is_exact else attention,
    )


def name_kernels(data: dict[str, object], runs: tuple[str, ...]) -> dict[str, object]:
    """Put the keys that scripts know, such as `has_fp8`, into *data* in place of its `runs`."""
    kept = {key: value for key, value in data.items() if key != "runs"}
    return kept | {f"has_{each.name}": each.name in runs for each in automatic()}


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


def klein_weights(linears: WeightFormat) -> Weights:
    """Return klein 4B's bytes with its large layers in *linears*.

    Transformer: 3.68 G parameters of the blocks, and 0.195 G others at 2 bytes. Text encoder: 27
    layers. VAE decoder and encoder: 2 bytes.
    """
    return Weights(
        transformer=round(3_680_000_000 * linears.weight_bytes) + OTHERS_BYTES,
        encoder=round(2_730_000_000 * FORMATS[linears.encoder].weight_bytes),
        decoder=99_200_000,
        image_encoder=68_900_000,
    )


def _exact_bytes(model: ModelSpec, linears: WeightFormat) -> int:
    """Return the bytes of all of *model*'s networks, which are published in bf16."""
    files = files_for(find_model(model.id), linears.file)
    weights = sum(file.size_bytes for file in files if file.path.endswith(".safetensors"))
    return round(weights * linears.weight_bytes / 2)
