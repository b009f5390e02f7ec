"""One warm worker for a command: the same runtime as the service's, with no HTTP before it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from app.domain import ImageSpec, ModelCard, ModelInfo
from app.engine import create_engine
from app.errors import InvalidRequest, StartupError
from app.images import OutputFormat
from app.runtime import Runtime, build_runtime
from app.service import Picture
from app.settings import Settings
from app.telemetry.gpu import Card
from app.worker.child import EngineFactory

PRECISIONS = ("auto", "fp8", "int8", "bf16", "fp32")

_PATIENCE_S = 86_400.0
_COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "white", "black")
_SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")


@asynccontextmanager
async def warm_runtime(
    settings: Settings, *, make_engine: EngineFactory = create_engine, gpu: Card | None = None
) -> AsyncIterator[tuple[Runtime, ModelInfo]]:
    """Start a worker for *settings* and give it once it is warm; close it at the end.

    Raises:
        StartupError: it does not start; one sentence says why.
    """
    patient = settings.model_copy(update={"deadline_s": _PATIENCE_S})
    runtime = build_runtime(patient, make_engine=make_engine, gpu=gpu)
    ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()

    def on_ready(info: ModelInfo) -> None:
        if not ready.done():
            ready.set_result(info)

    def on_ended(message: str) -> None:
        if not ready.done():
            ready.set_exception(StartupError(message))

    runtime.on_ready.append(on_ready)
    runtime.ended.add_done_callback(lambda ended: on_ended(ended.result().message))
    await runtime.start()
    try:
        yield runtime, await ready
    finally:
        await runtime.close()


async def make_picture(runtime: Runtime, spec: ImageSpec) -> Picture:
    """Let one picture go the way that every picture goes, and wait for its PNG."""
    ticket = runtime.service.submit([spec], client="cli", output=OutputFormat("png"))
    (picture,) = await ticket.pictures()
    return picture


def new_prompts() -> Iterator[str]:
    """Prompts that do not repeat for a long while and that every model knows, the demo too."""
    order = random.Random(0)
    combinations = [
        f"a {colour} {shape} on a {ground} background"
        for colour in _COLOURS
        for shape in _SHAPES
        for ground in _COLOURS
        if ground != colour
    ]
    while True:
        yield from order.sample(combinations, len(combinations))


def draft(card: ModelCard, prompt: str, width: int, height: int, steps: int | None) -> ImageSpec:
    """A picture at the model's own defaults, whose seed is always the same."""
    return ImageSpec(
        prompt=prompt,
        width=width,
        height=height,
        num_inference_steps=steps or card.default_steps,
        guidance_scale=card.default_guidance,
        seed=0,
    )


def parse_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT.

    Raises:
        InvalidRequest: it is none.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise InvalidRequest(f"{text!r} is no size; write WIDTHxHEIGHT, for example 1024x768.")
    return int(width), int(height)


def parse_precisions(text: str) -> tuple[str, ...]:
    """Read names separated by commas.

    Raises:
        InvalidRequest: one of them is no precision.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in PRECISIONS:
            raise InvalidRequest(f"{name!r} is no precision; take of {', '.join(PRECISIONS)}.")
    return names
