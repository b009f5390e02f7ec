"""`klein compare`: measure the error of quantization with the user's own weights and prompt.

Each precision, with each attention kernel that is asked for, makes the same image from the same
seed in its own worker, one after the other. The command writes a contact sheet (the images, and
below them their differences from the reference, amplified eight times), prints a table and, as its
last line, one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from app import images, logs
from app.cli.console import CACHE_DIR, MODEL, PLAN, SIZE, STEPS, Options, aligned, tabulate
from app.cli.output import check_output, choose_seed
from app.cli.warm_worker import (
    draft,
    make_pictures,
    new_prompts,
    parse_attentions,
    parse_precisions,
    parse_size,
    warm_runtime,
)
from app.domain import ImageSpec, ModelInfo, ModelSpec, RawImage
from app.engine import create_engine
from app.engine.quantization.formats import FORMATS
from app.errors import InvalidRequest, StartupError
from app.images import OutputFormat
from app.images.uploads import decode_upload, to_pillow
from app.service.results import Picture
from app.settings import Settings
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

DIFFERENCE_GAIN = 8
"""Factor by which differences are amplified."""

_GAP = 8
_PAPER = "white"
_INK = "#1e1e1e"
_AMPLIFIED = [min(255, DIFFERENCE_GAIN * level) for level in range(256)] * 3


@dataclass(frozen=True, slots=True)
class Compared:
    """One worker's image; *psnr_db* and *latent_error* are None for the reference itself.

    *label* is the precision, with the attention kernel where several were asked for; *latent_error*
    is ||latents - reference|| / ||reference||, in float32.
    """

    label: str
    info: ModelInfo
    picture: Picture
    image: RawImage
    psnr_db: float | None = None
    latent_error: float | None = None

    @property
    def likeness(self) -> str:
        """The PSNR as text."""
        if self.psnr_db is None:
            return "ref"
        return "equal" if math.isinf(self.psnr_db) else f"{self.psnr_db:.1f} dB"

    @property
    def caption(self) -> str:
        """The line below the image on the sheet."""
        peak = self.picture.peak
        reserved = f" {peak.reserved / 1e9:.1f} GB" if peak else ""
        seconds = self.picture.seconds["total"]
        return f"{self.label} {self.likeness} {seconds:.2f} s{reserved}"

    def as_json(self) -> dict[str, object]:
        """Return plain data; the PSNR of equal images is None, since JSON has no infinity."""
        peak = self.picture.peak
        return {
            "precision": self.info.precision,
            "attention": self.info.attention,
            "plan": self.info.plan,
            "psnr_db": (
                round(self.psnr_db, 2) if self.psnr_db and math.isfinite(self.psnr_db) else None
            ),
            "is_equal": self.psnr_db == math.inf,
            "is_reference": self.psnr_db is None,
            "latent_error": None if self.latent_error is None else round(self.latent_error, 6),
            "seconds": round(self.picture.seconds["total"], 6),
            "peak_allocated_bytes": peak.allocated if peak else None,
            "peak_reserved_bytes": peak.reserved if peak else None,
        }


_COLUMNS: dict[str, Callable[[Compared], str]] = {
    "precision": lambda one: one.info.precision,
    "plan": lambda one: one.info.plan,
    "PSNR": lambda one: one.likeness,
    "latents": lambda one: "ref" if one.latent_error is None else f"{one.latent_error:.2%}",
    "seconds": lambda one: f"{one.picture.seconds['total']:.3f}",
    "allocated GB": lambda one: (
        f"{one.picture.peak.allocated / 1e9:.2f}" if one.picture.peak else "-"
    ),
    "reserved GB": lambda one: (
        f"{one.picture.peak.reserved / 1e9:.2f}" if one.picture.peak else "-"
    ),
    "attention": lambda one: one.info.attention or "-",
}


OPTIONS: Options = {
    "prompt": {"help": "what the pictures show"},
    "--precision": {"default": "fp8,int8,bf16", "help": "separated by commas (fp8,int8,bf16)"},
    "--attention": {"help": "kernels separated by commas; each makes a picture at each precision"},
    "-o --output": {
        "type": Path,
        "default": Path("compare.png"),
        "help": "the contact sheet",
    },
    **SIZE,
    **STEPS,
    "--seed": {"type": int, "default": 0, "help": "-1 draws one (0)"},
    **MODEL,
    **PLAN,
    **CACHE_DIR,
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    cards: Cards | None = None,
) -> int:
    """Compare and print; return 0 where every worker made an image, else 1."""
    if arguments.output.suffix.lower() != ".png":
        raise InvalidRequest("The sheet's name must end in .png.")
    check_output(arguments.output)
    arguments.seed = choose_seed(arguments.seed)
    trials = _trials(parse_precisions(arguments.precision), arguments.attention)
    logs.set_up(style=settings.log_format, level="warning")
    found, notes = asyncio.run(_make_all(arguments, settings, trials, make_engine, cards))
    if not found:
        raise StartupError("No precision gave a picture, so there is nothing to compare.")
    found = against_reference(found)
    arguments.output.write_bytes(_draw(found, settings, arguments.prompt))
    lines = [*aligned(tabulate(_COLUMNS, found)), *(f"not compared: {each}" for each in notes)]
    if not arguments.json:
        print("\n".join(lines))
        print(
            f"written: {arguments.output} (below: differences, {DIFFERENCE_GAIN} times as strong)"
        )
    print(
        json.dumps(
            {"name": "klein.compare", "rows": [one.as_json() for one in found], "notes": notes}
        )
    )
    return 1 if notes else 0


def _trials(precisions: Sequence[str], attention: str | None) -> dict[str, dict[str, str]]:
    """Return the settings of each worker by its label.

    A precision whose networks are the libraries' own has no choice of a kernel, and one picture.

    Raises:
        InvalidRequest: *attention* names what is no kernel.
    """
    if attention is None:
        return {precision: {"precision": precision} for precision in precisions}
    trials: dict[str, dict[str, str]] = {}
    for precision in precisions:
        if precision in FORMATS and FORMATS[precision].is_exact:
            trials[precision] = {"precision": precision}
            continue
        for kernel in parse_attentions(attention):
            trials[f"{precision} {kernel}"] = {"precision": precision, "attention": kernel}
    return trials


def against_reference(found: Sequence[Compared]) -> list[Compared]:
    """Compare each with the one of most bytes a weight; of equal ones with the last."""
    best = max(reversed(found), key=lambda one: FORMATS[one.info.precision].weight_bytes)
    return [one if one is best else _beside(one, best) for one in found]


def _beside(one: Compared, best: Compared) -> Compared:
    ours, right = (np.frombuffer(each.picture.latents or b"", np.float32) for each in (one, best))
    error = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    return replace(one, psnr_db=psnr(one.image, best.image), latent_error=error)


async def _make_all(
    arguments: argparse.Namespace,
    settings: Settings,
    trials: Mapping[str, Mapping[str, str]],
    make_engine: EngineFactory,
    cards: Cards | None,
) -> tuple[list[Compared], list[str]]:
    """Return what was made, and a note on each worker that could not be started."""
    found: list[Compared] = []
    notes: list[str] = []

    def plan(model: ModelSpec) -> list[ImageSpec]:
        width, height = parse_size(arguments.size or "auto", model, settings.max_pixels)
        spec = draft(model, arguments.prompt, width, height, arguments.steps)
        spec = replace(spec, seed=arguments.seed, wants_latents=True)
        warm_up = replace(spec, prompt=next(new_prompts()))
        return [warm_up, spec]

    for label, changes in trials.items():
        chosen = settings.model_copy(update=changes)
        try:
            async with warm_runtime(
                chosen, make_engine=make_engine, cards=cards, plan=plan, what=label
            ) as (
                runtime,
                info,
                specs,
            ):
                _, picture = await make_pictures(runtime, specs, label)
            found.append(
                Compared(label, info, picture, decode_upload(picture.data, what="picture"))
            )
        except StartupError as error:
            notes.append(f"{label}: {error.message}")
    return found, notes


def _draw(found: Sequence[Compared], settings: Settings, prompt: str) -> bytes:
    reference = next(one.image for one in found if one.psnr_db is None)
    sheet = contact_sheet(
        [one.image for one in found],
        [one.caption for one in found],
        reference if len(found) > 1 else None,
    )
    text = {"Description": prompt, "compared": ", ".join(one.label for one in found)}
    return images.encode(sheet, OutputFormat("png"), text if settings.png_metadata else None)


def contact_sheet(
    images: Sequence[RawImage], captions: Sequence[str], reference: RawImage | None
) -> RawImage:
    """Lay *images*, all of one size, side by side, above their differences from *reference*.

    A caption that is wider than its image is cut at the image's edge.
    """
    width, height = images[0].width, images[0].height
    letters = max(10, width // 24)
    font, lines = ImageFont.load_default(letters), math.ceil(1.3 * letters)
    rows = 1 if reference is None else 2
    sheet = Image.new(
        "RGB",
        (len(images) * (width + _GAP) - _GAP, rows * (height + _GAP) + lines),
        _PAPER,
    )
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, picture = column * (width + _GAP), to_pillow(image)
        sheet.paste(picture, (x, 0))
        if reference is not None:
            difference = ImageChops.difference(picture, to_pillow(reference))
            sheet.paste(difference.point(_AMPLIFIED), (x, height + _GAP))
        strip = Image.new("RGB", (width, lines), _PAPER)
        ImageDraw.Draw(strip).text((0, 0), caption, _INK, font)
        sheet.paste(strip, (x, sheet.height - lines))
    return RawImage(sheet.width, sheet.height, sheet.tobytes())


def psnr(image: RawImage, reference: RawImage) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite where the images are equal."""
    ours, right = (np.frombuffer(each.pixels, np.uint8) for each in (image, reference))
    error = float(np.mean((ours.astype(np.float64) - right) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
