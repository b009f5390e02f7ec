"""One warm worker for a command: the same runtime as the service's, without HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

from app import logs
from app.cli.console import STAGES, progress_bar
from app.domain import ImageSpec, ModelInfo, ModelSpec
from app.engine import create_engine
from app.engine.quantization.formats import choices
from app.errors import InvalidRequest, StartupError
from app.images import OutputFormat
from app.limits import Limits
from app.runtime import Runtime, build_runtime
from app.service.results import Picture
from app.settings import Settings
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

_PATIENCE_S = 86_400.0
_REDRAW_S = 0.5
"""How often the bar that shows the loading is redrawn."""
_COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "white", "black")
_SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")


@asynccontextmanager
async def warm_runtime(
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    cards: Cards | None = None,
    plan: Callable[[ModelSpec], list[ImageSpec]] = lambda model: [],
    what: str = "",
) -> AsyncIterator[tuple[Runtime, ModelInfo, list[ImageSpec]]]:
    """Start a worker for *settings* and yield it once it is warm; close it at the end.

    The specs that *plan* returns are checked before anything is loaded, and yielded too. A line
    tells what is done meanwhile, and begins with *what*.

    Raises:
        StartupError: the worker does not start; one sentence says why.
        InvalidRequest: the model cannot generate a planned spec.
    """
    runtime = build_runtime(
        settings.model_copy(update={"deadline_s": _PATIENCE_S}),
        make_engine=make_engine,
        cards=cards,
    )
    specs = plan(runtime.model)
    for spec in specs:
        runtime.service.check(spec)
    outcomes: asyncio.Queue[ModelInfo | str] = asyncio.Queue()
    runtime.on_ready.append(outcomes.put_nowait)
    runtime.ended.add_done_callback(lambda ended: outcomes.put_nowait(ended.result().message))
    first = None
    async with runtime:
        with progress_bar() as show:
            while first is None:
                status = runtime.service.status()
                doing = STAGES.get(status.stage, status.stage)
                show(status.progress, f"{what}: {doing}" if what else doing)
                with suppress(TimeoutError):
                    first = await asyncio.wait_for(outcomes.get(), _REDRAW_S)
        if isinstance(first, str):
            raise StartupError(first)
        yield runtime, first, specs


async def make_pictures(
    runtime: Runtime, specs: Sequence[ImageSpec], what: str, output: OutputFormat | None = None
) -> list[Picture]:
    """Generate one image after the other as the service does, as PNG by default.

    A bar tells how many of *what* are done.
    """
    output = output or OutputFormat("png")
    pictures: list[Picture] = []
    with progress_bar() as show:
        for number, spec in enumerate(specs):
            show(number / len(specs), f"{what}, {number} of {len(specs)}")
            ticket = runtime.service.submit([spec], client="cli", output=output)
            pictures += await ticket.pictures()
    return pictures


def new_prompts() -> Iterator[str]:
    """Yield prompts that do not repeat for long and that every model knows, the demo too."""
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


def draft(model: ModelSpec, prompt: str, width: int, height: int, steps: int | None) -> ImageSpec:
    """Return the spec of an image at the model's defaults, with a fixed seed."""
    return ImageSpec(
        prompt=prompt,
        width=width,
        height=height,
        num_inference_steps=model.default_steps if steps is None else steps,
        guidance_scale=model.default_guidance,
        seed=0,
    )


def parse_size(text: str, model: ModelSpec, max_pixels: int) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT, or `auto` for the model's default size, by the rules of HTTP.

    Raises:
        InvalidRequest: it is no size, or none that *model* generates here.
    """
    if text == "auto":
        return model.default_width, model.default_height
    try:
        return Limits.of(model, max_pixels).parse_size(text)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{logs.clip(text)!r} is no WIDTHxHEIGHT that this model makes. {error.message}"
        ) from None


def parse_precisions(text: str) -> tuple[str, ...]:
    """Parse names of precisions separated by commas.

    Raises:
        InvalidRequest: one of them is no precision.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in choices():
            raise InvalidRequest(f"{name!r} is no precision; take of {', '.join(choices())}.")
    return names


def parse_attentions(text: str) -> tuple[str, ...]:
    """Parse names of attention kernels separated by commas.

    Raises:
        InvalidRequest: one of them is no kernel.
    """
    from app.engine.modules.attention import AUTO, KERNELS

    known = (AUTO, *KERNELS)
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise InvalidRequest(f"{name!r} is no attention kernel; take of {', '.join(known)}.")
    return names
