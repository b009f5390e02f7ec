"""The real engine on a GPU that really fails, and an entry point that gives it to the service.

    python -m tests.support.broken_gpu report=/tmp/report.jsonl

The prompt says what happens: `oom` fills the GPU's memory up to a cap before the picture is made,
`assert` reads beyond a tensor's end in a kernel during the first step, anything else just makes it.
Both errors come from CUDA itself and go through the engine's own error mapping. Without a GPU the
same two classes of torch are raised by hand, to rehearse. The report has a line of JSON with what
torch holds before and after each picture. No setting of the service selects this engine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain import Engine, Generated, ImageSpec, LoadProgress, ModelInfo, Progress, Stage
from app.engine import create_engine
from app.engine.config import EngineConfig

HEADROOM = 1.03
"""The cap of the memory, above the most that the warm-up picture took."""


class BrokenGpu:
    """Implements `app.domain.Engine` around the real one."""

    def __init__(self, engine: Engine, config: EngineConfig, report: str) -> None:
        self._engine = engine
        self._device = config.device
        self._report = Path(report)
        self._cap = 0

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Load, and cap the memory at what the warm-up needed and three per cent."""
        info = self._engine.load(on_progress)
        if self._device is not None:
            import torch

            total = torch.cuda.get_device_properties(self._device).total_memory
            self._cap = int(torch.cuda.max_memory_reserved(self._device) * HEADROOM)
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._cap / total), self._device)
        return info

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Make a picture, or break the GPU on the way, as the prompt says."""
        before = self._allocated()
        try:
            if spec.prompt == "oom":
                return self._fill(spec, on_progress, is_cancelled)
            if spec.prompt == "assert":
                return self._engine.generate(
                    spec, _striking(on_progress, self._device), is_cancelled
                )
            return self._engine.generate(spec, on_progress, is_cancelled)
        finally:
            if spec.prompt != "assert":
                self._tell(prompt=spec.prompt, before=before, after=self._allocated())

    def close(self) -> None:
        """Release the GPU."""
        self._engine.close()

    def _fill(self, spec: ImageSpec, on_progress: Any, is_cancelled: Any) -> Generated:
        """Leave no room below the cap, so that the picture's own work finds none."""
        import torch

        if self._device is None:

            def strike(progress: Progress) -> None:
                raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")

            return self._engine.generate(spec, strike, is_cancelled)
        torch.cuda.empty_cache()
        free = self._cap - torch.cuda.memory_reserved(self._device) - 2**25
        ballast = torch.empty(max(0, free), dtype=torch.uint8, device=f"cuda:{self._device}")
        try:
            return self._engine.generate(spec, on_progress, is_cancelled)
        finally:
            del ballast
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        import torch

        return 0 if self._device is None else int(torch.cuda.memory_allocated(self._device))

    def _tell(self, **facts: object) -> None:
        with self._report.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def _striking(
    on_progress: Callable[[Progress], None], device: int | None
) -> Callable[[Progress], None]:
    """Launch a kernel that reads beyond a tensor's end once the first step is done."""
    import torch

    def strike(progress: Progress) -> None:
        on_progress(progress)
        if progress.stage is Stage.DENOISE and progress.step == 1:
            if device is None:
                raise torch.AcceleratorError("CUDA error: device-side assert (rehearsed)")
            where = torch.full((64,), 10**6, device=f"cuda:{device}")
            torch.zeros(8, device=f"cuda:{device}")[where].sum()

    return strike


@dataclass(frozen=True)
class MakeBrokenGpu:
    """Builds the engine inside the worker process; it pickles with the report's path."""

    report: str

    def __call__(self, config: EngineConfig) -> BrokenGpu:
        """Build it."""
        return BrokenGpu(create_engine(config), config, self.report)


if __name__ == "__main__":
    from app.cli.serve import serve
    from app.errors import KleinError
    from app.settings import Settings
    from tests.support import broken_gpu

    # Through the module's own name, so that the worker process finds the class under it.
    make_engine = broken_gpu.MakeBrokenGpu(sys.argv[1].removeprefix("report="))
    try:
        sys.exit(serve(Settings.read(os.environ), make_engine=make_engine))
    except KleinError as error:
        sys.exit(f"klein: {error.message}")
