"""The service with a stop-watch on the card: how long it idles between two pictures.

    python -m benchmarks.timed_service report=/tmp/report.jsonl

The real engine behind the real entry point. A CUDA event is recorded before the first kernel of
each picture (before its prompt is cut into tokens, so a little too early) and after its last, and
the file gets a line of JSON for each picture: milliseconds from the last kernel of the picture
before to the first of this one. A line is written for each stage of the start too, with the time
of day; each names the worker's process. Without a card the host's clock stands in, to
rehearse.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain import Engine, Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.engine import create_engine, imports
from app.engine.config import EngineConfig


class TimedEngine:
    """Implements `app.domain.Engine` around the real one."""

    def __init__(self, engine: Engine, config: EngineConfig, report: str) -> None:
        self._engine = engine
        self._is_card = config.device is not None
        self._report = report
        self._begun: Any = None
        self._ended: Any = None

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Load, and from then on note when a picture's work begins and ends."""

        def tell(progress: LoadProgress) -> None:
            self._note(stage=f"{progress.stage} {progress.detail}", at=time.time())
            on_progress(progress)

        self._note(stage="imported", at=time.time())
        info = self._engine.load(tell)
        self._note(stage="ready", at=time.time())
        from app.engine.pipeline import image_tensors

        engine: Any = importlib.import_module("app.engine.engine")
        encode_text, to_host = engine.encode_text, image_tensors.to_host

        def begin(*inputs: Any) -> Any:
            self._begun = self._now()
            return encode_text(*inputs)

        def end(pixels: Any) -> Any:
            before, self._ended = self._ended, self._now()
            on_host = to_host(pixels)
            if before is not None:
                self._note(idle_ms=round(self._milliseconds(before, self._begun), 3))
            return on_host

        engine.encode_text, image_tensors.to_host = begin, end
        return info

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Make a picture."""
        return self._engine.generate(spec, on_progress, is_cancelled)

    def close(self) -> None:
        """Let go of the card."""
        self._engine.close()

    def _now(self) -> Any:
        if not self._is_card:
            return time.perf_counter()
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _milliseconds(self, first: Any, second: Any) -> float:
        if not self._is_card:
            return float(1000 * (second - first))
        return float(first.elapsed_time(second))

    def _note(self, **facts: object) -> None:
        write_line(self._report, pid=os.getpid(), **facts)


def write_line(report: str, **facts: object) -> None:
    """Append a line of JSON."""
    with Path(report).open("a") as file:
        file.write(json.dumps(facts) + "\n")


@dataclass(frozen=True)
class MakeTimed:
    """Builds the engine inside the worker process; it pickles with the file's path."""

    report: str
    imports = staticmethod(imports)

    def __call__(self, config: EngineConfig) -> TimedEngine:
        """Build it."""
        write_line(self.report, stage="worker", at=time.time(), pid=os.getpid())
        return TimedEngine(create_engine(config), config, self.report)


if __name__ == "__main__":
    from app.cli.serve import serve
    from app.settings import Settings
    from benchmarks import timed_service

    # Through the module's own name, so that the worker process finds the class under it.
    make_engine = timed_service.MakeTimed(sys.argv[1].removeprefix("report="))
    sys.exit(serve(Settings.read(os.environ), make_engine=make_engine))
