"""Pictures by a model that the command loads itself, with the service's own worker and queue."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

from app import logs
from app.api.schema.loras import use_all
from app.cli.client.request import read_picture
from app.cli.console import note
from app.cli.drawing import Drawn, Event, OnEvent, Preview, Step, denoised
from app.cli.environment import own_settings
from app.cli.old_cache import tell_old_cache
from app.cli.output import Output
from app.cli.warm_worker import draft, warm_runtime
from app.domain import ImageSpec, Lora, ModelSpec, Progress
from app.engine import create_engine
from app.errors import InvalidRequest
from app.images.preparing import AUTO, TRANSPARENT, Edit, Upload, prepare
from app.limits import Limits
from app.runtime import Runtime
from app.service.results import Picture, Queued
from app.service.results import Preview as ServicePreview
from app.service.ticket import Ticket
from app.settings import Settings, read_adapter
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

_LIST_S = 60.0
"""How long it may take to look through the directory of adapters."""


def draw_here(
    arguments: argparse.Namespace,
    environ: Mapping[str, str],
    output: Output,
    on_event: OnEvent,
    make_engine: EngineFactory | None = None,
    cards: Cards | None = None,
) -> None:
    """Load the model and have it make the pictures; *on_event* gets what happens.

    Raises:
        KleinError: it cannot be loaded, or a picture cannot be made.
    """
    names = ("model", "precision", "plan", "cache_dir")
    settings = own_settings(environ, **{name: getattr(arguments, name) for name in names})
    tell_old_cache(settings)
    logs.set_up(style=settings.log_format, level="warning")
    asyncio.run(_draw(arguments, settings, output, on_event, make_engine or create_engine, cards))


async def _draw(
    arguments: argparse.Namespace,
    settings: Settings,
    output: Output,
    on_event: OnEvent,
    make_engine: EngineFactory,
    cards: Cards | None,
) -> None:
    def plan(model: ModelSpec) -> list[ImageSpec]:
        return _plan(arguments, settings, model)

    async with warm_runtime(settings, make_engine=make_engine, cards=cards, plan=plan) as (
        runtime,
        info,
        specs,
    ):
        loras: tuple[Lora, ...] = ()
        if info.linear_shapes and (arguments.lora or settings.loras):
            loras = await _find_loras(runtime, arguments.lora)
        for index, spec in enumerate(specs):
            spec = replace(spec, loras=loras)
            ticket = runtime.service.submit([spec], client="cli", output=output.format)
            async with aclosing(_told(ticket)) as events:
                async for event in events:
                    on_event(index, event)


def _plan(arguments: argparse.Namespace, settings: Settings, model: ModelSpec) -> list[ImageSpec]:
    """Return the specs, before anything is loaded."""
    limits = Limits.of(model, settings.max_pixels, settings.max_references)
    size = None
    if arguments.size not in (None, "auto"):
        size = limits.parse_size(arguments.size)
    width, height = size or (model.default_width, model.default_height)
    guidance = model.default_guidance if arguments.guidance is None else arguments.guidance
    spec = draft(model, arguments.prompt, width, height, arguments.steps)
    steps = spec.num_inference_steps
    spec = replace(
        spec, guidance_scale=guidance, previews=max(0, min(arguments.previews, steps - 1))
    )
    if arguments.image:
        edit = _read_edit(arguments, settings, limits, size)
        for each in edit.warnings:
            note(each)
        width, height = edit.size
        spec = replace(spec, width=width, height=height, references=edit.references, mask=edit.mask)
    return [replace(spec, seed=arguments.seed + index) for index in range(arguments.n)]


def _read_edit(
    arguments: argparse.Namespace,
    settings: Settings,
    limits: Limits,
    size: tuple[int, int] | None,
) -> Edit:
    """Decode the pictures to edit; in this process, since they are the user's own."""
    limits.check_references(len(arguments.image), "--image")
    uploads = [Upload(read_picture(path), "--image") for path in arguments.image]
    mask = None
    if arguments.mask:
        repaints = AUTO if settings.mask == "auto" else TRANSPARENT
        mask = Upload(read_picture(arguments.mask), "--mask", repaints=repaints)
    return prepare(uploads, mask, size, limits.nearest)


async def _told(ticket: Ticket) -> AsyncGenerator[Event, None]:
    """Yield what happens to the only picture of *ticket*."""
    async with aclosing(ticket.events()) as events:
        async for _, event in events:
            if isinstance(event, Progress):
                share = denoised(event.step, event.steps)
                yield Step(f"{event.stage} {event.step}/{event.steps}", share)
            elif isinstance(event, ServicePreview):
                yield Preview(event.picture)
            elif isinstance(event, Picture):
                yield _drawn(event)
            elif isinstance(event, Queued):
                yield Step("waiting")


def _drawn(made: Picture) -> Drawn:
    return Drawn(
        made.data, made.width, made.height, made.seed, made.seconds, warnings=made.warnings
    )


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
