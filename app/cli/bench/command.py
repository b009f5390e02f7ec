"""`klein bench`: measure the latency of images with `klein serve`'s worker and service, no HTTP.

After warm-up it makes *n* images per size and precision, one at a time and each with a new prompt,
and measures from acceptance to the finished PNG. It prints a table and, as its last line, one JSON
document; `--out report.md` writes a report to hand in (docs/cards.md).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from app import logs
from app.cli.bench.machine import describe_machine
from app.cli.bench.measure import Row, floor_of, sum_up
from app.cli.bench.report import Run, render_table, write_report
from app.cli.bench.sampler import Sampler, impatient_clock
from app.cli.warm_worker import (
    check_output,
    draft,
    make_picture,
    new_prompts,
    parse_precisions,
    parse_size,
    warm_runtime,
)
from app.domain import ImageSpec, ModelInfo, ModelSpec
from app.engine import create_engine
from app.errors import InvalidRequest, KleinError, StartupError
from app.runtime import Runtime
from app.settings import Settings
from app.telemetry.gpu import Gpu
from app.worker.child import EngineFactory

WARM_UP_IMAGES = 2
_USUAL_SIZES = ((512, 512), (1024, 1024))


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's own options."""
    parser = commands.add_parser("bench", help="measure how fast this card makes pictures")
    parser.add_argument("--sizes", help="WIDTHxHEIGHT, separated by commas")
    parser.add_argument("-n", type=int, default=20, help="pictures for each size (20)")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own if left out")
    parser.add_argument("--precision", help="separated by commas (KLEIN_PRECISION)")
    parser.add_argument("--model", help="catalogue key, local folder, or auto (KLEIN_MODEL)")
    parser.add_argument("--out", type=Path, help="write a report to this .md file, charts beside")
    parser.set_defaults(run=run, settings=lambda given: {"model": given.model})


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    *,
    make_engine: EngineFactory = create_engine,
    gpu: Gpu | None = None,
) -> int:
    """Measure and print; return 0, or 1 without a single row."""
    if arguments.n < 1:
        raise InvalidRequest("-n must be at least 1.")
    if arguments.out and arguments.out.suffix != ".md":
        raise InvalidRequest("The report's name must end in .md.")
    if arguments.out:
        check_output(arguments.out)
    logs.set_up(style=settings.log_format, level="warning")
    index = settings.device if isinstance(settings.device, int) else 0
    bench = Bench(
        settings,
        sizes=tuple(size for size in (arguments.sizes or "").split(",") if size),
        count=arguments.n,
        steps=arguments.steps,
        make_engine=make_engine,
        gpu=gpu or Gpu(index, clock=impatient_clock()),
    )
    precisions = parse_precisions(arguments.precision or settings.precision)
    result = asyncio.run(bench.run(precisions))
    print(render_table(result))
    if arguments.out:
        for path in write_report(result, arguments.out):
            print(f"written: {path}")
    print(json.dumps(result.as_json()))
    return 0 if result.rows else 1


class Bench:
    """One run over all precisions and sizes; each precision starts its own worker."""

    def __init__(
        self,
        settings: Settings,
        *,
        sizes: tuple[str, ...],
        count: int,
        steps: int | None,
        make_engine: EngineFactory,
        gpu: Gpu,
    ) -> None:
        self._settings = settings
        self._sizes = sizes
        self._count = count
        self._steps = steps
        self._make_engine = make_engine
        self._gpu = gpu
        self._worker_pid: int | None = None
        self._prompts = new_prompts()
        self._rows: list[Row] = []
        self._loaded: list[ModelInfo] = []
        self._notes: list[str] = []
        self._has_gpu = settings.device != "cpu"
        before = gpu.read() if self._has_gpu else None
        self._bytes_before = before.used_bytes if before else None

    async def run(self, precisions: tuple[str, ...]) -> Run:
        """Measure each of *precisions*; note and skip what cannot be measured."""
        machine = describe_machine(self._gpu)
        with Sampler(lambda: self._gpu.read() if self._has_gpu else None, self._processes) as watch:
            for precision in precisions:
                settings = self._settings.model_copy(update={"precision": precision})
                try:
                    await self._measure_precision(settings, watch)
                except StartupError as error:
                    self._note(f"{precision}: {error.message}")
        return Run(
            machine=machine,
            date=datetime.now(UTC).date().isoformat(),
            rows=tuple(self._rows),
            loaded=tuple(self._loaded),
            notes=tuple(self._notes),
            readings=tuple(watch.readings),
        )

    async def _measure_precision(self, settings: Settings, watch: Sampler) -> None:
        self._say(f"{settings.precision}: starting the worker")
        async with warm_runtime(
            settings, make_engine=self._make_engine, gpu=self._gpu, planned=self._plan
        ) as (runtime, info):
            self._worker_pid = runtime.worker_pid
            self._loaded.append(info)
            for size in self._read_sizes(runtime.model):
                try:
                    self._rows.append(await self._measure_size(runtime, info, size, watch))
                except KleinError as error:
                    self._note(f"{info.precision} {size[0]}x{size[1]}: {error.message}")
        self._worker_pid = None

    def _plan(self, model: ModelSpec) -> ImageSpec:
        """Return specs that differ in size alone, each checked before anything is generated."""
        return draft(model, "a plan", *self._read_sizes(model)[0], self._steps)

    def _read_sizes(self, model: ModelSpec) -> tuple[tuple[int, int], ...]:
        most = self._settings.max_pixels
        given = tuple(parse_size(size, model, most) for size in self._sizes)
        return given or _default_sizes(model)

    async def _measure_size(
        self, runtime: Runtime, info: ModelInfo, size: tuple[int, int], watch: Sampler
    ) -> Row:
        self._say(f"{info.precision} {size[0]}x{size[1]}: {self._count} images")
        specs = [
            draft(runtime.model, next(self._prompts), *size, self._steps)
            for _ in range(WARM_UP_IMAGES + self._count)
        ]
        for spec in specs[:WARM_UP_IMAGES]:
            await make_picture(runtime, spec)
        since_s = watch.now_s()
        pictures = [await make_picture(runtime, spec) for spec in specs[WARM_UP_IMAGES:]]
        model = self._gpu.read() if self._has_gpu else None
        return sum_up(
            specs[0],
            info,
            pictures,
            watch.usage(since_s),
            gpu_bytes_before=self._bytes_before,
            floor_s=floor_of(specs[0], info, model),
        )

    def _processes(self) -> list[int]:
        return [os.getpid(), *([self._worker_pid] if self._worker_pid else [])]

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._say(text)

    @staticmethod
    def _say(text: str) -> None:
        print(f"klein: {text}", file=sys.stderr, flush=True)


def _default_sizes(model: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Return the model's default size and the usual ones within its limits."""
    sizes = {(model.default_width, model.default_height), *_USUAL_SIZES}
    return tuple(
        sorted(
            size
            for size in sizes
            if max(size) <= model.max_side and size[0] * size[1] <= model.max_pixels
        )
    )
