"""`klein doctor --card`: the report for a GPU that is not installed, from its datasheet."""

from __future__ import annotations

from dataclasses import asdict, replace

from app.cli.doctor.checks import judge_asked_plan, tell_forecast
from app.cli.doctor.plan_preview import (
    DISPLAY_BYTES,
    PlanPreview,
    Target,
    assume,
    floor_seconds,
    name_kernels,
    preview_plan,
)
from app.cli.doctor.report import Report
from app.domain import ModelSpec
from app.engine import roofline
from app.engine.models.registry import MODELS, find_model, find_spec
from app.engine.quantization.formats import FORMATS
from app.errors import InvalidRequest
from app.model_choice import asked_rank
from app.settings import Settings

_KLEIN = next(iter(MODELS))


def answer_for_absent_gpu(key: str, settings: Settings) -> Report:
    """Report what klein would do on the GPU called *key* in `roofline.GPUS`.

    Raises:
        InvalidRequest: the table has no such GPU; the message names those that it has.
    """
    spec = roofline.find_gpu(key)
    if spec is None:
        raise InvalidRequest(
            f"There is no datasheet of {key!r} here; take one of "
            f"{', '.join(card.key for card in roofline.GPUS)}."
        )
    is_named = settings.model in MODELS and not find_model(settings.model).is_embedded
    model = find_spec(settings.model if is_named else _KLEIN)
    target = replace(assume(spec), lora_rank=asked_rank(settings))
    ahead = preview_plan(target, settings, model)
    found = Report(data={}, computed_for=spec.name)
    _tell_gpu(found, spec, target)
    found.tell("model", f"{model.id}, {model.title}")
    tell_forecast(found, ahead, model, is_computed=True)
    _tell_otherwise(found, target, ahead, settings, model)
    floors_s = {
        name: floor_seconds(spec, name, model)
        for name, each in sorted(FORMATS.items())
        if each.is_choice and each.rate
    }
    found.tell("floors", _floors_words(spec, floors_s))
    if ahead.plan is None:
        found.complain(
            f"{target.free_bytes / 1e9:.1f} GB are too little even with the text encoder in host "
            "memory.",
            "Take the display off the card, or a card with 8 GB or more.",
            is_fatal=True,
        )
    elif settings.plan != "auto":
        judge_asked_plan(found, ahead.plan, model)
    else:
        # Where nothing else, no display either, is on the card.
        alone = preview_plan(replace(target, free_bytes=spec.memory_bytes), settings, model).plan
        if alone is not None and alone.name != ahead.plan.name:
            found.tell("alone", f"with nothing else on the card the plan is {alone.name}")
    found.data.update(
        card=asdict(spec),
        assumed=name_kernels(asdict(replace(target, spec=None)), target.runs),
        model=model.id,
        forecast=asdict(ahead),
        floors_s=floors_s,
    )
    return found


def _tell_gpu(found: Report, spec: roofline.GpuDatasheet, target: Target) -> None:
    major, minor = spec.capability
    found.tell(
        "card",
        f"{spec.name}: {spec.sms} SMs at {spec.clock_ghz:.3f} GHz, "
        f"{spec.bandwidth_bytes_s / 1e9:.0f} GB/s, compute capability {major}.{minor}",
    )
    found.tell(
        "memory",
        f"{spec.memory_bytes / 1e9:.1f} GB, of which {target.free_bytes / 1e9:.1f} GB are assumed "
        f"to be free ({DISPLAY_BYTES / 1e9:.0f} GB for a display and what is on it)",
    )


def _floors_words(spec: roofline.GpuDatasheet, floors_s: dict[str, float | None]) -> str:
    words = [
        f"{name} {seconds:.2f} s"
        for name, seconds in floors_s.items()
        if seconds is not None and getattr(spec, FORMATS[name].rate or "") is not None
    ]
    return ", ".join(words) + "; of linears in that precision, everything else in bf16"


def _tell_otherwise(
    found: Report, target: Target, ahead: PlanPreview, settings: Settings, model: ModelSpec
) -> None:
    """Report the precision chosen where the start-up probe finds no working 8-bit kernel."""
    slow = preview_plan(replace(target, runs=(), race=None), settings, model)
    if slow.precision_reason != ahead.precision_reason:
        seconds = "" if slow.floor_s is None else f", floor {slow.floor_s:.2f} s"
        found.tell("otherwise", f"{slow.precision}: {slow.precision_reason}{seconds}")
