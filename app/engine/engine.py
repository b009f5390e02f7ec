"""The engine: owns the card and the loaded model, makes one picture at a time.

It knows specs and pixels, no queue, no process, no HTTP. One thread calls it. A picture depends on
its spec alone: noise, scheduler and every buffer are made anew, and nothing is kept but what is a
pure function of the spec.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from app.domain import (
    Generated,
    ImageSpec,
    LoadProgress,
    ModelInfo,
    PeakMemory,
    Progress,
    Stage,
    StageTimings,
)
from app.engine import catalog, compiling, faults, pictures, stages
from app.engine.config import EngineConfig
from app.engine.parts import Parts
from app.engine.previews import preview, preview_steps
from app.engine.start import Started, start
from app.engine.warming import NO_PICTURE, warm_up
from app.errors import KleinError, StartupError

_log = logging.getLogger(__name__)


class KleinEngine:
    """Implements `app.domain.Engine` for every variant of the catalogue."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._card = catalog.card(config.model)
        self._started: Started | None = None
        self._noise = ThreadPoolExecutor(1, "noise")

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Read the weights, make one real picture, and say what came of it."""
        begun = time.perf_counter()
        try:
            started = start(self._config, self._card, on_progress)
            self._started = started
            warm_up_s = warm_up(started, self._card, self._make, on_progress)
        except KleinError:
            raise
        except Exception as error:
            _log.exception("The model could not be loaded.")
            faults.release(error)
            raise StartupError(_load_failure(error)) from None
        # What is there now stays: no later collection need look through the libraries again.
        gc.freeze()
        return started.info(self._config, warm_up_s, time.perf_counter() - begun)

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> Generated:
        """Make one picture.

        Raises:
            Cancelled, OutOfMemory, GenerationFailed, WorkerLost
        """
        return self._generate(spec, on_progress, should_stop)

    @torch.no_grad()
    def _generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        *,
        is_trial: bool = False,
    ) -> Generated:
        if self._started is None:
            raise StartupError("The model is not loaded; load it first.")
        try:
            # Drawn beside the text stage: on the host it takes as long as a whole encoder pass.
            noise = self._noise.submit(stages.draw_noise, self._started.parts, spec)
            parts = self._started.parts
            return _Job(parts, spec, noise, on_progress, should_stop, is_trial).run()
        except Exception as error:
            fault = faults.translate(error)
        raise fault

    def _make(self, spec: ImageSpec) -> Generated:
        return self._generate(spec, lambda _: None, lambda: False, is_trial=True)

    def close(self) -> None:
        """Let go of the card."""
        self._noise.shutdown()
        compiling.thaw()
        if self._started is not None:
            gc.unfreeze()
        self._started = None
        faults.give_back()


@dataclass(slots=True)
class _Job:
    """One picture being made."""

    parts: Parts
    spec: ImageSpec
    noise: Future[torch.Tensor]
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    is_trial: bool
    """Whether the picture is looked at before its values become bytes, which hides what is wrong
    with them."""

    def run(self) -> Generated:
        """Go through the stages and measure each."""
        parts, spec = self.parts, self.spec
        clock = _Clock(parts.device)
        self._tell(Stage.TEXT, 0)
        text = stages.encode_text(parts, spec)
        text_s = clock.lap()
        references_s = 0.0
        references = stages.References()
        if spec.references:
            self._tell(Stage.REFERENCE, 0)
            references = stages.encode_references(parts, spec)
            references_s = clock.lap()
        latents, steps_s = self._denoise(text, references, clock)
        self._tell(Stage.DECODE, spec.num_inference_steps)
        pixels = self._decode(latents, references.source)
        timings = StageTimings(text_s, references_s, sum(steps_s), clock.lap(), steps_s)
        kept = latents.float().cpu().numpy().tobytes() if spec.wants_latents else None
        del latents, references
        peak, held = clock.memory()
        return Generated(
            image=pictures.to_raw(pixels),
            timings=timings,
            peak=peak,
            prompt_tokens=text.token_count,
            is_prompt_cut=text.is_cut,
            is_prompt_cached=text.is_cached if parts.cache.is_on else None,
            held=held,
            latents=kept,
        )

    def _denoise(
        self,
        text: stages.Text,
        references: stages.References,
        clock: _Clock,
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        shown = preview_steps(self.spec.previews, self.spec.num_inference_steps)
        shape = stages.grid(self.spec)
        steps_s: list[float] = []

        def on_step(number: int, estimate: Callable[[], torch.Tensor]) -> None:
            picture = preview(self.parts, estimate, shape) if number in shown else None
            steps_s.append(clock.lap())
            progress = Progress(Stage.DENOISE, number, self.spec.num_inference_steps, picture)
            self.on_progress(progress)

        latents = stages.denoise(
            self.parts,
            self.spec,
            text,
            references,
            self.noise.result(),
            on_step=on_step,
            should_stop=self.should_stop,
        )
        return latents, tuple(steps_s)

    def _decode(self, latents: torch.Tensor, source: stages.Source | None) -> torch.Tensor:
        made = stages.decode(self.parts, latents, stages.grid(self.spec))
        if self.is_trial and not torch.isfinite(made).all():
            raise StartupError(NO_PICTURE)
        pixels = pictures.to_host(pictures.to_bytes(made))
        if source is not None:
            pixels = pictures.paste(pixels, source.pixels, source.mask)
        return pixels

    def _tell(self, stage: Stage, step: int) -> None:
        self.on_progress(Progress(stage, step, self.spec.num_inference_steps))


class _Clock:
    """Seconds between laps, with the card's work done, and the card's peak since the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Wait for the card and return the seconds since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed

    def memory(self) -> tuple[PeakMemory | None, PeakMemory | None]:
        """Return the most that torch held since the start, and what it holds now; None without a
        card.
        """
        if self._device.type != "cuda":
            return None, None
        # Once: each of torch's functions for a single figure goes through all of them.
        figures = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved = (
            figures[f"{name}_bytes"]["all"] for name in ("allocated", "reserved")
        )
        return (
            PeakMemory(allocated["peak"], reserved["peak"]),
            PeakMemory(allocated["current"], reserved["current"]),
        )


def _load_failure(error: Exception) -> str:
    if faults.is_out_of_memory(error):
        return (
            "The card has too little free memory for this model; close what else uses it, "
            "or choose KLEIN_PRECISION=fp8."
        )
    return "The model could not be loaded; the log above says why."
