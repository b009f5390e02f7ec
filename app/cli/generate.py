"""`klein generate`: one picture into a file, by the same worker and service as over HTTP."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Literal

from app import logs
from app.domain import ImageSpec, ModelCard
from app.errors import InvalidRequest, StartupError
from app.images import OutputFormat
from app.runtime import Runtime, build_runtime
from app.settings import Settings

_FORMATS: dict[str, Literal["png", "jpeg", "webp"]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's own options."""
    parser = commands.add_parser("generate", help="make one picture and write it to a file")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"))
    parser.add_argument("--size", help="WIDTHxHEIGHT; the model's own size where left out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", help="catalogue key, local folder, or auto (KLEIN_MODEL)")
    parser.set_defaults(run=run, settings=lambda given: {"model": given.model})


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Make the picture; return the exit code."""
    if arguments.output.suffix.lower() not in _FORMATS:
        raise InvalidRequest("The output's name must end in .png, .jpg, .jpeg or .webp.")
    logs.set_up(style=settings.log_format, level="warning")
    asyncio.run(_generate(arguments, settings))
    return 0


async def _generate(arguments: argparse.Namespace, settings: Settings) -> None:
    runtime = build_runtime(settings)
    await runtime.start()
    try:
        await _wait_until_ready(runtime)
        spec = _spec(arguments, runtime.model, runtime.service.random_seed())
        output = OutputFormat(_FORMATS[arguments.output.suffix.lower()])
        ticket = runtime.service.submit([spec], client="cli", output=output)
        (picture,) = await ticket.pictures()
    finally:
        await runtime.close()
    arguments.output.write_bytes(picture.data)
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in picture.seconds.items())
    print(f"{arguments.output}: {picture.width}x{picture.height}, seed {picture.seed}, {stages}")


async def _wait_until_ready(runtime: Runtime) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    runtime.on_ready.append(lambda info: ready.set_result(None))
    runtime.ended.add_done_callback(
        lambda ended: ready.set_exception(StartupError(ended.result().message))
    )
    await ready


def _spec(arguments: argparse.Namespace, card: ModelCard, seed: int) -> ImageSpec:
    """Fill in the model's defaults; the service checks the limits."""
    width, height = card.default_width, card.default_height
    if arguments.size:
        try:
            width, height = (int(side) for side in arguments.size.split("x"))
        except ValueError:
            raise InvalidRequest("--size must be WIDTHxHEIGHT, for example 1024x768.") from None
    return ImageSpec(
        prompt=arguments.prompt,
        width=width,
        height=height,
        num_inference_steps=arguments.steps or card.default_steps,
        guidance_scale=card.default_guidance if arguments.guidance is None else arguments.guidance,
        seed=seed if arguments.seed is None else arguments.seed,
    )
