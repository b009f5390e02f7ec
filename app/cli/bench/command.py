"""`klein bench`: measure the latency of images with `klein serve`'s worker and service, no HTTP.

After warm-up it makes *n* images per size and precision, one at a time and each with a new prompt,
and measures from acceptance to the finished PNG. It prints a table and, as its last line, one JSON
document; `--out report.md` writes a report to hand in (docs/cards.md).
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from app import logs
from app.cli.bench.machine import Sampler, describe_machine
from app.cli.bench.measure import Row, floor_of, sum_up
from app.cli.bench.report import Run, render_table, write_report
from app.cli.console import CACHE_DIR, MODEL, PLAN, STEPS, Options, note
from app.cli.output import check_output
from app.cli.warm_worker import (
    draft,
    make_pictures,
    new_prompts,
    parse_precisions,
    parse_size,
    warm_runtime,
)
from app.domain import GpuSnapshot, ImageSpec, ModelInfo, ModelSpec
from app.engine import create_engine
from app.errors import InvalidRequest, KleinError, StartupError
from app.model_choice import named_cards
from app.runtime import Runtime
from app.settings import Settings
from app.telemetry.cards import Cards
from app.telemetry.gpu import Gpu
from app.worker.child import EngineFactory

WARM_UP_IMAGES = 2
_USUAL_SIZES = ((512, 512), (1024, 1024))


OPTIONS: Options = {
    "--sizes": {"help": "WIDTHxHEIGHT, separated by commas"},
    "-n": {"type": int, "default": 20, "help": "pictures for each size (20)"},
    **STEPS,
    "--precision": {"help": "separated by commas (KLEIN_PRECISION)"},
    **MODEL,
    **PLAN,
    **CACHE_DIR,
    "--out": {"type": Path, "help": "write a report to this .md file, charts beside"},
}


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    cards: Cards | None = None,
) -> int:
    """Measure and print; return 0, or 1 without a single row."""
    if arguments.n < 1:
        raise InvalidRequest("-n must be at least 1.")
    if arguments.out and arguments.out.suffix != ".md":
        raise InvalidRequest("The report's name must end in .md.")
    if arguments.out:
        check_output(arguments.out)
    logs.set_up(style=settings.log_format, level="warning")
    cards = cards or Cards(cache_s=0)
    gpu = next(map(cards.open, named_cards(settings, cards)), None)
    result = Run(describe_machine(gpu), datetime.now(UTC).date().isoformat())
    bench = Bench(settings, arguments, make_engine, cards, gpu, result)
    asyncio.run(bench.run(parse_precisions(arguments.precision or settings.engine_precision)))
    written = write_report(result, arguments.out) if arguments.out else ()
    if not arguments.json:
        print("\n".join([render_table(result), *(f"written: {path}" for path in written)]))
    print(json.dumps(result.as_json()))
    return 0 if result.rows else 1


@dataclass(slots=True)
class Bench:
    """One run over all precisions and sizes; each precision starts its own worker."""

    settings: Settings
    arguments: argparse.Namespace
    make_engine: EngineFactory
    cards: Cards
    gpu: Gpu | None
    result: Run
    """Filled by `run`."""
    prompts: Iterator[str] = field(default_factory=new_prompts)

    async def run(self, precisions: tuple[str, ...]) -> None:
        """Measure each of *precisions*; note and skip what cannot be measured."""
        with Sampler(self._read_gpu) as sampler:
            for precision in precisions:
                settings = self.settings.model_copy(update={"precision": precision})
                try:
                    await self._measure_precision(settings, sampler)
                except StartupError as error:
                    self._note(f"{precision}: {error.message}")
        self.result.readings = sampler.readings

    async def _measure_precision(self, settings: Settings, sampler: Sampler) -> None:
        async with warm_runtime(
            settings,
            make_engine=self.make_engine,
            cards=self.cards,
            plan=self._plan,
            what=settings.engine_precision,
        ) as (runtime, info, specs):
            sampler.worker_pid = runtime.workers.pid
            self.result.loaded.append(info)
            for spec in specs:
                what = f"{info.precision} {spec.width}x{spec.height}"
                try:
                    self.result.rows.append(
                        await self._measure_size(runtime, info, spec, what, sampler)
                    )
                except KleinError as error:
                    self._note(f"{what}: {error.message}")
        sampler.worker_pid = None

    def _plan(self, model: ModelSpec) -> list[ImageSpec]:
        """Return one spec for each size."""
        given = [size for size in (self.arguments.sizes or "").split(",") if size]
        sizes = [parse_size(size, model, self.settings.max_pixels) for size in given]
        return [
            draft(model, "a plan", *size, self.arguments.steps)
            for size in sizes or _default_sizes(model)
        ]

    async def _measure_size(
        self, runtime: Runtime, info: ModelInfo, spec: ImageSpec, what: str, sampler: Sampler
    ) -> Row:
        count = self.arguments.n
        specs = [replace(spec, prompt=next(self.prompts)) for _ in range(WARM_UP_IMAGES + count)]
        await make_pictures(runtime, specs[:WARM_UP_IMAGES], f"{what}, warming up")
        first = len(sampler.readings)
        pictures = await make_pictures(runtime, specs[WARM_UP_IMAGES:], what)
        floor_s = floor_of(spec, info, self._read_gpu())
        return sum_up(spec, info, pictures, sampler.usage(first), floor_s)

    def _read_gpu(self) -> GpuSnapshot | None:
        return None if self.gpu is None else self.gpu.read()

    def _note(self, text: str) -> None:
        self.result.notes.append(text)
        note(text)


def _default_sizes(model: ModelSpec) -> Sequence[tuple[int, int]]:
    """Return the model's default size and the usual ones within its limits."""
    sizes = {(model.default_width, model.default_height), *_USUAL_SIZES}
    return sorted(
        size
        for size in sizes
        if max(size) <= model.max_side and size[0] * size[1] <= model.max_pixels
    )
