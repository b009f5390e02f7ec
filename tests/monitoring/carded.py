"""The service on a card that is not there: NVML's answers are a 3060's, pictures are scripted.

    python -m tests.monitoring.carded

What happens to a picture stands in its prompt: `oom`, `fail` and `hang` are faults, `slow` takes
a second, everything else a few hundredths. No setting of the service selects this engine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from app.domain import (
    Generated,
    ImageSpec,
    LoadProgress,
    LoraLoad,
    ModelInfo,
    PeakMemory,
    Progress,
    Stage,
)
from app.engine.config import EngineConfig
from app.errors import Cancelled, GenerationFailed, OutOfMemory
from tests.support.scripted_engine import Script, ScriptedEngine

GPU = "NVIDIA GeForce RTX 3060"
PEAK = PeakMemory(allocated=7_370_000_000, reserved=7_830_000_000)
HELD = PeakMemory(allocated=6_800_000_000, reserved=7_000_000_000)


class CardedEngine(ScriptedEngine):
    """Makes one colour per prompt in no time, as if on a card; fails as its prompt says."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, Script())
        self._seen: set[str] = set()
        self._seen_references: set[bytes] = set()

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Say what a real engine would say of its card."""
        info = super().load(on_progress)
        return replace(
            info,
            model="flux.2-klein-4b",
            device=GPU,
            precision="int8",
            plan="resident/tiled",
            cuda="13.0",
            weights_bytes=6_900_000_000,
        )

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Do what the prompt says."""
        if spec.prompt == "oom":
            raise OutOfMemory("The card has no room for this picture; ask for a smaller one.")
        if spec.prompt == "fail":
            raise GenerationFailed("The picture could not be made.")
        if spec.prompt == "hang":
            time.sleep(3600)
        if spec.prompt == "slow":
            self._linger(spec, on_progress, is_cancelled)
        made = super().generate(spec, on_progress, is_cancelled)
        is_cached = spec.prompt in self._seen
        self._seen.add(spec.prompt)
        references = [bytes(reference.pixels) for reference in spec.references]
        are_cached = tuple(pixels in self._seen_references for pixels in references)
        self._seen_references.update(references)
        return replace(
            made,
            timings=replace(made.timings, text=0.02, decode=0.03),
            peak=PEAK,
            held=HELD,
            is_prompt_cached=is_cached,
            are_references_cached=are_cached,
            lora_loads=(LoraLoad("a-style", 0.004, "host"),),
            lora_bytes=98_000_000,
        )

    def _linger(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        for _ in range(20):
            if is_cancelled():
                raise Cancelled
            time.sleep(0.05)
            on_progress(Progress(Stage.DENOISE, 0, spec.num_inference_steps))


if __name__ == "__main__":
    from app.cli.serve import serve
    from app.settings import Settings
    from app.telemetry.cards import Cards
    from tests.monitoring import carded
    from tests.support.fake_nvml import FakeNvml

    # Through the module's own name, so that the worker process finds the class under it.
    cards = Cards(load_nvml=FakeNvml, environ={})
    sys.exit(serve(Settings.read(os.environ), make_engine=carded.CardedEngine, cards=cards))
