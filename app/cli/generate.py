"""`klein generate`: one image into a file, by the same worker and service as over HTTP."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from app import logs
from app.api.schema.loras import use_all
from app.cli.console import MODEL, SIZE, STEPS, Options
from app.cli.warm_worker import check_output, choose_seed, draft, make_pictures, warm_runtime
from app.domain import ImageSpec, Lora, ModelSpec
from app.engine import create_engine
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.images.formats import OUTPUT_FORMATS, list_words
from app.limits import Limits
from app.runtime import Runtime
from app.service.results import Picture
from app.settings import Settings, read_adapter
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

_LIST_S = 60.0
"""How long it may take to look through the directory of adapters."""
_NAMES = {
    "loras": "--lora",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "size": "--size",
    "prompt": "The prompt",
}


OPTIONS: Options = {
    "prompt": {},
    "-o --output": {"type": Path, "default": Path("out.png")},
    **SIZE,
    **STEPS,
    "--guidance": {"type": float},
    "--seed": {"type": int, "help": "-1 or nothing draws one"},
    "--lora": {
        "action": "append",
        "metavar": "NAME:SCALE",
        "help": "an adapter of `klein lora list`, instead of those of KLEIN_LORAS; up to four",
    },
    **MODEL,
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    cards: Cards | None = None,
) -> int:
    """Generate the image; return the exit code."""
    formats = {suffix: each.name for each in OUTPUT_FORMATS.values() for suffix in each.suffixes}
    if arguments.output.suffix.lower() not in formats:
        raise InvalidRequest(f"The output's name must end in {list_words(formats)}.")
    output = OutputFormat(formats[arguments.output.suffix.lower()])
    check_output(arguments.output)
    logs.set_up(style=settings.log_format, level="warning")
    seed = choose_seed(arguments.seed)
    try:
        picture = asyncio.run(_generate(arguments, settings, seed, output, make_engine, cards))
    except InvalidRequest as error:
        error.rename(_NAMES)
        raise
    arguments.output.write_bytes(picture.data)
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in picture.seconds.items())
    print(f"{arguments.output}: {picture.width}x{picture.height}, seed {picture.seed}, {stages}")
    return 0


async def _generate(
    arguments: argparse.Namespace,
    settings: Settings,
    seed: int,
    output: OutputFormat,
    make_engine: EngineFactory,
    cards: Cards | None,
) -> Picture:
    def plan(model: ModelSpec) -> list[ImageSpec]:
        width, height = model.default_width, model.default_height
        if arguments.size not in (None, "auto"):
            width, height = Limits.of(model, settings.max_pixels).parse_size(arguments.size)
        spec = draft(model, arguments.prompt, width, height, arguments.steps)
        guidance = model.default_guidance if arguments.guidance is None else arguments.guidance
        return [replace(spec, seed=seed, guidance_scale=guidance)]

    async with warm_runtime(settings, make_engine=make_engine, cards=cards, plan=plan) as (
        runtime,
        info,
        specs,
    ):
        loras: tuple[Lora, ...] = ()
        if info.linear_shapes and (arguments.lora or settings.loras):
            loras = await _find_loras(runtime, arguments.lora)
        specs = [replace(spec, loras=loras) for spec in specs]
        (picture,) = await make_pictures(runtime, specs, "images", output)
        return picture


async def _find_loras(runtime: Runtime, named: list[str] | None) -> tuple[Lora, ...]:
    """Return the adapters that are *named*, or the default, once the directory has been read."""
    adapters = runtime.service.adapters
    with suppress(TimeoutError):
        await asyncio.wait_for(adapters.is_whole.wait(), _LIST_S)
    if named is None:
        return adapters.default
    try:
        pairs = [read_adapter(text) for text in named]
    except ValueError:
        raise InvalidRequest("--lora must be a name and a scale, such as style:0.8.") from None
    return use_all(pairs, adapters, runtime.service.limits)
