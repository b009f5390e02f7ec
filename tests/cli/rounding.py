"""The engine that `klein compare` is tried on; alone, for each of its processes imports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from app.domain import Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.engine.config import EngineConfig
from app.errors import StartupError
from tests.monitoring.carded import CardedEngine


class RoundingEngine(CardedEngine):
    """Says which precision it was told, knows no int8, and errs at fp8.

    By two steps of 255 in the pixels, and by one of the latents, which are 3 and 4; with attention
    in int8 by one step more.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._precision = config.precision
        self._attention = config.attention

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        if self._precision == "int8":
            raise StartupError("The precision int8 is not available here.")
        told = super().load(on_progress)
        return replace(told, precision=self._precision, attention=self._attention)

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        made = super().generate(spec, on_progress, is_cancelled)
        error = 2 if self._precision == "fp8" else 0
        error += self._attention == "int8"
        pixels = np.frombuffer(made.image.pixels, np.uint8) // 2 + error
        latents = np.array([3, 5 if error else 4], np.float32)
        return replace(
            made,
            image=replace(made.image, pixels=pixels.tobytes()),
            latents=latents.tobytes() if spec.wants_latents else None,
        )
