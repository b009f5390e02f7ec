"""`klein selftest`: the first start with real weights, checked and written down.

The pictures of three fixed prompts and of one edit are made at the served precision, then again, in
another worker, in bf16 (fp32 for the demo on the processor), which waits in host memory where the
card has no room for it. A contact sheet and a JSON report are written.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from app import __version__, images, logs
from app.cli.compare import contact_sheet, psnr
from app.cli.console import LOADING, SIZE, Options, note
from app.cli.output import check_output
from app.cli.warm_worker import draft, make_pictures, parse_size, warm_runtime
from app.domain import ImageSpec, ModelInfo, ModelSpec, RawImage
from app.engine import create_engine
from app.engine.hub.download import choose_file, missing_bytes
from app.engine.models.registry import find_model
from app.engine.quantization.formats import AUTO, FORMATS
from app.errors import InvalidRequest, KleinError
from app.images import OutputFormat
from app.images.uploads import decode_upload
from app.model_choice import Choice, choose_devices, choose_model, largest_card
from app.service.results import Picture
from app.settings import Settings
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

if TYPE_CHECKING:
    from app.engine.checkpoint.notes import FileNotes

LEAST_DB = 20.0
"""The least PSNR of each 8-bit picture against the reference's of the same seed."""
LEAST_DEVIATION = 4.0
"""The least standard deviation over a picture's pixels, of 255."""
MOST_SATURATED = 0.5
"""The largest share of a picture's values that may be 0 or 255."""

_SEED = 20_260_101
_PROMPTS = (
    "a photograph of a red fox in fresh snow at dawn",
    "an oil painting of a harbour at dusk, warm light on the water",
    "a glass of water on a wooden table beside a window, soft morning light",
)
_DEMO_PROMPTS = (
    "a red circle on a gray background",
    "a yellow star on a blue background",
    "a purple square left of a green ring on a pink background",
)
_EDIT = "make the circle green"

OPTIONS: Options = {
    "-o --output": {
        "type": Path,
        "default": Path("selftest.png"),
        "help": "the contact sheet; the report is written beside it as .json",
    },
    **SIZE,
    **LOADING,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked, and the figure by which it was judged."""

    name: str
    passed: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Made:
    """The pictures of one worker, with what it said of itself."""

    info: ModelInfo
    pictures: Sequence[Picture]
    images: Sequence[RawImage]

    @property
    def captions(self) -> list[str]:
        """The lines below the images on the sheet."""
        return [f"{self.info.precision} {each.seconds['total']:.2f} s" for each in self.pictures]


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    cards: Cards | None = None,
) -> int:
    """Make, check, write and tell; return 0 where every check passed, else 1."""
    sheet, report = arguments.output, arguments.output.with_suffix(".json")
    if sheet.suffix.lower() != ".png":
        raise InvalidRequest("The sheet's name must end in .png.")
    for path in (sheet, report):
        check_output(path)
    logs.set_up(style=settings.log_format, level="warning")
    cards = cards or Cards()
    choice = choose_model(settings, largest_card(settings, cards))
    is_small = find_model(choice.key).is_embedded
    # `auto` gives a small model no 8-bit format, but one is to be tested.
    asked = settings.engine_precision
    tested_name = "fp8" if is_small and asked == AUTO else asked
    on_processor = choose_devices(settings, choice, cards)[0].index is None

    def make(precision: str, plan: str) -> Made | str:
        chosen = settings.model_copy(update={"precision": precision, "plan": plan})
        return asyncio.run(_make(chosen, arguments.size, make_engine, cards))

    tested = make(tested_name, settings.plan)
    # Now, since the reference may bring another file of the transformer.
    notes = _read_notes(choice, settings, tested)
    reference: Made | str | None = "not made, since the first worker failed"
    if isinstance(tested, Made):
        reference = None
        if not FORMATS[tested.info.precision].is_exact:
            exact = "fp32" if is_small and on_processor else "bf16"
            _tell_download(choice, settings, exact)
            reference = make(exact, "auto")
    checks = [*judge(tested, reference), _judge_file(notes)]
    _write(sheet, [each for each in (tested, reference) if isinstance(each, Made)])
    document = json.dumps(
        _strict(_document(checks, tested, reference, notes)), indent=2, allow_nan=False
    )
    report.write_text(document + "\n")
    attached = f"{sheet} and {report}" if isinstance(tested, Made) else f"{report}"
    print(document if arguments.json else _told(checks, tested, attached))
    return 0 if all(check.passed for check in checks) else 1


def _told(checks: Sequence[Check], tested: Made | str, attached: str) -> str:
    return "\n".join(
        [
            *(
                f"{'passed' if check.passed else 'FAILED':8}{check.name}: {check.figure}"
                for check in checks
            ),
            f'Please open an issue at the project, named "selftest, {_device(tested)}", and attach '
            f"{attached}.",
        ]
    )


def judge(tested: Made | str, reference: Made | str | None) -> list[Check]:
    """Check the pictures; a str says why there are none, a *reference* of None that none is due."""
    if isinstance(tested, str):
        return [Check("start", passed=False, figure=tested)]
    info, pixels = tested.info, [np.frombuffer(each.pixels, np.uint8) for each in tested.images]
    latents = [np.frombuffer(each.latents or b"", np.float32) for each in tested.pictures]
    bad, count = sum(int((~np.isfinite(each)).sum()) for each in latents), sum(map(len, latents))
    # Of the channel that varies most: a picture of one colour has none.
    deviations = [float(each.reshape(-1, 3).std(axis=0).max()) for each in pixels]
    shares = [float(((each == 0) | (each == 255)).mean()) for each in pixels]
    return [
        Check(
            "start",
            passed=True,
            figure=f"{info.model} in {info.precision}, plan {info.plan}, {info.load_s:.1f} s",
        ),
        Check("finite", bad == 0 < count, f"{bad} of {count} values of the latents are no numbers"),
        Check(
            "not flat",
            min(deviations) >= LEAST_DEVIATION,
            f"least standard deviation {min(deviations):.1f}, needed {LEAST_DEVIATION:g}",
        ),
        Check(
            "not saturated",
            max(shares) <= MOST_SATURATED,
            f"largest share of 0 and 255 {max(shares):.1%}, allowed {MOST_SATURATED:.0%}",
        ),
        _judge_likeness(tested, reference),
    ]


def _judge_likeness(tested: Made, reference: Made | str | None) -> Check:
    name = "likeness"
    if reference is None:
        return Check(name, passed=True, figure=f"{tested.info.precision} is exact, none is needed")
    if isinstance(reference, str):
        return Check(name, passed=False, figure=reference)
    found = _likenesses(tested, reference)
    return Check(
        name,
        min(found) >= LEAST_DB,
        f"{tested.info.precision} against {reference.info.precision}, plan {reference.info.plan}: "
        f"{', '.join(f'{each:.1f}' for each in found)} dB, needed {LEAST_DB:g}",
    )


def _likenesses(tested: Made, reference: Made) -> list[float]:
    return [psnr(ours, right) for ours, right in zip(tested.images, reference.images, strict=True)]


def _judge_file(notes: FileNotes | str) -> Check:
    if isinstance(notes, str):
        return Check("file", passed=False, figure=notes)
    are_usable = all(np.isfinite(each) and each > 0 for each in notes.input_scales.values())
    return Check("file", are_usable, notes.summary)


async def _make(
    settings: Settings, size: str | None, make_engine: EngineFactory, cards: Cards
) -> Made | str:
    """Make all pictures in one worker, or return why there are none."""

    def plan(model: ModelSpec) -> list[ImageSpec]:
        width, height = parse_size(size or "auto", model, settings.max_pixels)
        prompts = _DEMO_PROMPTS if model.hub_id is None else _PROMPTS
        specs = [draft(model, prompt, width, height, None) for prompt in (*prompts, _EDIT)]
        specs = [replace(spec, seed=_SEED, wants_latents=True) for spec in specs]
        return [*specs[:-1], replace(specs[-1], references=(_reference_picture(width, height),))]

    try:
        async with warm_runtime(
            settings,
            make_engine=make_engine,
            cards=cards,
            plan=plan,
            what=settings.engine_precision,
        ) as (runtime, info, specs):
            pictures = await make_pictures(runtime, specs, settings.engine_precision)
    except InvalidRequest:
        raise
    except KleinError as error:
        return error.message
    return Made(info, pictures, [decode_upload(each.data, what="picture") for each in pictures])


def _reference_picture(width: int, height: int) -> RawImage:
    """Draw a red circle on blue, the picture that is edited."""
    picture = Image.new("RGB", (width, height), "#2850c8")
    radius = min(width, height) // 4
    box = [side // 2 + sign * radius for sign in (-1, 1) for side in (width, height)]
    ImageDraw.Draw(picture).ellipse(box, fill="#dc2828")
    return RawImage(width, height, picture.tobytes())


def _tell_download(choice: Choice, settings: Settings, precision: str) -> None:
    entry = find_model(choice.key)
    if choice.path is None and not entry.is_embedded:
        size = missing_bytes(entry, settings.cache_dir, FORMATS[precision].file)
        if size:
            note(f"{precision}: {size / 1e9:.1f} GB are downloaded for the comparison")


def _read_notes(choice: Choice, settings: Settings, tested: Made | str) -> FileNotes | str:
    """Read what the transformer's file says of itself; torch is imported here."""
    from app.engine.checkpoint.notes import read_notes

    entry = find_model(choice.key)
    if choice.path is not None:
        path = Path(choice.path)
    elif entry.folder is not None:
        path = entry.folder
    elif isinstance(tested, str):
        return "not read, since the worker failed"
    else:
        taken = FORMATS[tested.info.precision]
        instead = taken.instead(settings.engine_precision)
        file = choose_file(entry, settings.cache_dir, taken.file, instead)
        path = settings.cache_dir / "models" / entry.spec.id / file
    try:
        return read_notes(path, settings.vae)
    except KleinError as error:
        return error.message


def _write(path: Path, made: Sequence[Made]) -> None:
    """Write the contact sheet: a row for each worker; none where there are no pictures."""
    if not made:
        return
    rows = [contact_sheet(each.images, each.captions, None) for each in made]
    pixels = b"".join(bytes(each.pixels) for each in rows)
    sheet = RawImage(rows[0].width, sum(each.height for each in rows), pixels)
    path.write_bytes(images.encode(sheet, OutputFormat("png"), None))


def _document(
    checks: Sequence[Check],
    tested: Made | str,
    reference: Made | str | None,
    notes: FileNotes | str,
) -> dict[str, object]:
    """Return the report as plain data."""
    found: list[float] = []
    if isinstance(tested, Made) and isinstance(reference, Made):
        found = _likenesses(tested, reference)
    return {
        "name": "klein.selftest",
        "version": __version__,
        "passed": all(check.passed for check in checks),
        "checks": [asdict(check) for check in checks],
        # JSON has no infinity: equal pictures are null.
        "psnr_db": [round(each, 2) if np.isfinite(each) else None for each in found],
        "workers": [
            {
                **made.info.facts,
                "seconds": [round(each.seconds["total"], 4) for each in made.pictures],
                "peak_reserved_bytes": [
                    each.peak.reserved if each.peak else None for each in made.pictures
                ],
            }
            for made in (tested, reference)
            if isinstance(made, Made)
        ],
        "file": notes if isinstance(notes, str) else asdict(notes),
    }


def _strict(value: object) -> object:
    """Write numbers that JSON does not have, such as a damaged scale's NaN, as text."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _device(tested: Made | str) -> str:
    return tested.info.device if isinstance(tested, Made) else "no start"
