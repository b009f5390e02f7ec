"""`klein compare`: measure the error of quantization with the user's own weights and prompt.

Each precision makes the same image from the same seed in its own worker, one after the other. The
command writes a contact sheet (the images, and below them their differences from the reference,
amplified eight times), prints a table and, as its last line, one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from app import images, logs
from app.cli.compare.contact_sheet import DIFFERENCE_GAIN, Panel, contact_sheet, psnr
from app.cli.warm_worker import (
    check_output,
    choose_seed,
    draft,
    make_picture,
    new_prompts,
    parse_precisions,
    parse_size,
    warm_runtime,
)
from app.domain import ImageSpec, ModelInfo, ModelSpec, PeakMemory, RawImage
from app.engine import create_engine
from app.errors import InvalidRequest, StartupError
from app.images import OutputFormat
from app.images.uploads import decode_upload
from app.service.results import Picture
from app.settings import Settings
from app.telemetry.gpu import Gpu
from app.worker.child import EngineFactory

_BEST_FIRST = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Compared:
    """One precision's image; *psnr_db* and *latent_error* are None for the reference itself.

    *latents* are float32; *latent_error* is ||latents - reference|| / ||reference||.
    """

    precision: str
    plan: str
    image: RawImage
    latents: bytes = field(repr=False)
    seconds: float
    peak: PeakMemory | None
    psnr_db: float | None = None
    latent_error: float | None = None

    @property
    def likeness(self) -> str:
        """The PSNR as text."""
        if self.psnr_db is None:
            return "ref"
        return "equal" if math.isinf(self.psnr_db) else f"{self.psnr_db:.1f} dB"

    def as_json(self) -> dict[str, Any]:
        """Return plain data; the PSNR of equal images is None, since JSON has no infinity."""
        is_number = self.psnr_db is not None and math.isfinite(self.psnr_db)
        return {
            "precision": self.precision,
            "plan": self.plan,
            "psnr_db": round(self.psnr_db, 2) if self.psnr_db and is_number else None,
            "is_equal": self.psnr_db == math.inf,
            "is_reference": self.psnr_db is None,
            "latent_error": None if self.latent_error is None else round(self.latent_error, 6),
            "seconds": round(self.seconds, 6),
            "peak_allocated_bytes": self.peak.allocated if self.peak else None,
            "peak_reserved_bytes": self.peak.reserved if self.peak else None,
        }


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's own options."""
    parser = commands.add_parser("compare", help="make one picture at several precisions")
    parser.add_argument("prompt")
    parser.add_argument(
        "--precision", default="fp8,int8,bf16", help="separated by commas (fp8,int8,bf16)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("compare.png"))
    parser.add_argument("--size", help="WIDTHxHEIGHT; the model's own size where left out")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="catalogue key, local folder, or auto (KLEIN_MODEL)")
    parser.set_defaults(run=run, settings=lambda given: {"model": given.model})


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    gpu: Gpu | None = None,
) -> int:
    """Compare and print; return 0 where every precision made an image, else 1."""
    if arguments.output.suffix.lower() != ".png":
        raise InvalidRequest("The sheet's name must end in .png.")
    check_output(arguments.output)
    arguments.seed = choose_seed(arguments.seed)
    precisions = parse_precisions(arguments.precision)
    logs.set_up(style=settings.log_format, level="warning")
    found, notes = asyncio.run(
        _make_all(arguments, settings, precisions, make_engine=make_engine, gpu=gpu)
    )
    if not found:
        raise StartupError("No precision gave a picture, so there is nothing to compare.")
    found = against_reference(found)
    arguments.output.write_bytes(_draw(found, settings, arguments.prompt))
    print(render(found, notes))
    print(f"written: {arguments.output} (below: differences, {DIFFERENCE_GAIN} times as strong)")
    rows = [one.as_json() for one in found]
    print(json.dumps({"name": "klein.compare", "rows": rows, "notes": notes}))
    return 1 if notes else 0


def against_reference(found: Sequence[Compared]) -> list[Compared]:
    """Compare each with the most precise one found: fp32, else bf16, else the last."""
    order = {name: place for place, name in enumerate(_BEST_FIRST)}
    best = min(reversed(found), key=lambda one: order.get(one.precision, len(order)))
    return [one if one is best else _beside(one, best) for one in found]


def _beside(one: Compared, best: Compared) -> Compared:
    ours, right = (np.frombuffer(each.latents, np.float32) for each in (one, best))
    error = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    return replace(one, psnr_db=psnr(one.image, best.image), latent_error=error)


def render(found: Sequence[Compared], notes: Sequence[str]) -> str:
    """Return the table for the terminal."""
    heads = ("precision", "plan", "PSNR", "latents", "seconds", "allocated GB", "reserved GB")
    table = [heads, *(_cells(one) for one in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([*lines, *(f"not compared: {note}" for note in notes)])


async def _make_all(
    arguments: argparse.Namespace,
    settings: Settings,
    precisions: tuple[str, ...],
    *,
    make_engine: EngineFactory,
    gpu: Gpu | None,
) -> tuple[list[Compared], list[str]]:
    found: list[Compared] = []
    notes: list[str] = []

    def plan(model: ModelSpec) -> ImageSpec:
        return _spec(arguments, model, settings.max_pixels)

    for precision in precisions:
        print(f"klein: {precision}: starting the worker", file=sys.stderr, flush=True)
        chosen = settings.model_copy(update={"precision": precision})
        try:
            async with warm_runtime(chosen, make_engine=make_engine, gpu=gpu, planned=plan) as (
                runtime,
                info,
            ):
                spec = plan(runtime.model)
                await make_picture(runtime, replace(spec, prompt=next(new_prompts())))
                picture = await make_picture(runtime, spec)
        except StartupError as error:
            notes.append(f"{precision}: {error.message}")
            continue
        found.append(_compared(info, picture))
    return found, notes


def _spec(arguments: argparse.Namespace, model: ModelSpec, max_pixels: int) -> ImageSpec:
    width, height = parse_size(arguments.size or "auto", model, max_pixels)
    spec = draft(model, arguments.prompt, width, height, arguments.steps)
    return replace(spec, seed=arguments.seed, wants_latents=True)


def _compared(info: ModelInfo, picture: Picture) -> Compared:
    image = decode_upload(picture.data, what="picture")
    seconds, latents = picture.seconds["total"], picture.latents or b""
    return Compared(info.precision, info.plan, image, latents, seconds, picture.peak)


def _draw(found: Sequence[Compared], settings: Settings, prompt: str) -> bytes:
    reference = next(one.image for one in found if one.psnr_db is None)
    entries = [Panel(one.image, _words(one)) for one in found]
    sheet = contact_sheet(entries, reference if len(found) > 1 else None)
    note = {"prompt": prompt, "compared": ", ".join(one.precision for one in found)}
    return images.encode(sheet, OutputFormat("png"), note if settings.png_metadata else None)


def _words(one: Compared) -> str:
    peak = f" {one.peak.reserved / 1e9:.1f} GB" if one.peak else ""
    return f"{one.precision} {one.likeness} {one.seconds:.2f} s{peak}"


def _cells(one: Compared) -> tuple[str, ...]:
    peak = one.peak
    return (
        one.precision,
        one.plan,
        one.likeness,
        "ref" if one.latent_error is None else f"{one.latent_error:.2%}",
        f"{one.seconds:.3f}",
        f"{peak.allocated / 1e9:.2f}" if peak else "-",
        f"{peak.reserved / 1e9:.2f}" if peak else "-",
    )
