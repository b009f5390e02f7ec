"""The engine: owns the GPU and the loaded model, and generates one image at a time.

It knows specs and pixels, no queue, no process, no HTTP. It is not thread-safe. An image depends on
its spec alone: noise, scheduler and every buffer are created per image, and only pure functions of
the spec are cached.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
from app.engine import error_mapping
from app.engine.config import EngineConfig
from app.engine.hub import disk
from app.engine.load import LoadedModel, load
from app.engine.models.registry import find_spec
from app.engine.pipeline import image_tensors
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.decode import decode, preview, preview_steps
from app.engine.pipeline.denoise import denoise, draw_noise
from app.engine.pipeline.reference_cache import ReferenceKey, reference_keys
from app.engine.pipeline.references import References, Source, encode_references
from app.engine.pipeline.text import Text, encode_text
from app.engine.warmup import NO_PICTURE, warm_up
from app.errors import KleinError, StartupError

_log = logging.getLogger(__name__)


class KleinEngine:
    """Implements `app.domain.Engine` for every registered model."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._model = find_spec(config.model)
        self._started: LoadedModel | None = None
        self._helpers = ThreadPoolExecutor(2, "engine helper")

    def load(self, on_progress: Callable[[LoadProgress], None]) -> ModelInfo:
        """Load the weights, generate the warm-up image, and describe the loaded model.

        Raises:
            StartupError: the model cannot be loaded or does not generate.
        """
        begun = time.perf_counter()
        # What was imported is permanent: traversing it would take most of each collection's time.
        gc.freeze()
        try:
            loaded = load(self._config, self._model, on_progress)
            self._started = loaded
            warm_up_s = warm_up(
                self._model,
                loaded.components.device,
                partial(
                    self.generate,
                    on_progress=lambda _: None,
                    is_cancelled=lambda: False,
                    is_trial=True,
                ),
                on_progress,
            )
        except KleinError:
            raise
        except Exception as error:
            _log.exception("The model could not be loaded.")
            error_mapping.release(error)
            if error_mapping.is_out_of_memory(error):
                raise StartupError(
                    "The card has too little free memory for this model; close what else uses it, "
                    "or choose KLEIN_PRECISION=fp8."
                ) from None
            raise StartupError("The model could not be loaded; the log above says why.") from None
        _prune_cache(self._config)
        # And so is what was loaded.
        gc.freeze()
        return loaded.info(self._config, warm_up_s, time.perf_counter() - begun)

    @torch.no_grad()
    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
        *,
        is_trial: bool = False,
    ) -> Generated:
        """Generate one image; of a trial, pixels that are not finite end the start.

        Raises:
            Cancelled: *is_cancelled* returned true between two steps.
            OutOfMemory: memory did not suffice for this spec; the engine stays usable.
            GenerationFailed: the job failed; the engine stays usable.
            WorkerLost: the CUDA context is broken; the process has to end.
        """
        if self._started is None:
            raise StartupError("The model is not loaded; load it first.")
        try:
            # Concurrent with the text stage: on the CPU it takes as long as a text encoder pass.
            components = self._started.components
            noise = self._helpers.submit(draw_noise, components, spec)
            is_looked_up = spec.references and components.references.size
            keys = self._helpers.submit(reference_keys, spec) if is_looked_up else None
            return _Job(components, spec, noise, keys, on_progress, is_cancelled, is_trial).run()
        except Exception as error:
            fault = error_mapping.translate(error)
        raise fault

    def close(self) -> None:
        """Release the model and the GPU's memory."""
        self._helpers.shutdown()
        gc.unfreeze()
        self._started = None
        disk.release()
        error_mapping.give_back()


def _prune_cache(config: EngineConfig) -> None:
    """Keep KLEIN_CACHE_MAX_GB, as far as derived files go that nobody uses; never fail."""
    if not (limit := config.cache_max_bytes):
        return
    try:
        pruned = disk.prune(Path(config.cache_dir), limit)
    except OSError as error:
        _log.warning("KLEIN_CACHE_DIR could not be pruned (%s).", error.strerror)
        return
    for each in pruned.removed:
        _log.info("Deleted %s, %.2f GB, for KLEIN_CACHE_MAX_GB.", each.name, each.size_bytes / 1e9)
    if pruned.left_bytes > limit:
        _log.warning(
            "KLEIN_CACHE_DIR takes %.2f GB, more than KLEIN_CACHE_MAX_GB: what is left is "
            "published, in use or being downloaded; klein cache list shows it.",
            pruned.left_bytes / 1e9,
        )


@dataclass(slots=True)
class _Job:
    """The generation of one image."""

    components: PipelineComponents
    spec: ImageSpec
    noise: Future[torch.Tensor]
    keys: Future[tuple[ReferenceKey, ...]] | None
    """Of the references; None where none are cached."""
    on_progress: Callable[[Progress], None]
    is_cancelled: Callable[[], bool]
    is_trial: bool
    """Whether non-finite pixels are an error; the conversion to bytes would hide them."""

    def run(self) -> Generated:
        """Run the stages and measure the duration of each."""
        components, spec = self.components, self.spec
        clock = _Clock(components.device)
        self._tell(Stage.TEXT, 0)
        text = encode_text(components, spec)
        text_s = clock.lap()
        references, references_s = References(), 0.0
        if spec.references:
            self._tell(Stage.REFERENCE, 0)
            references = encode_references(
                components, spec, self.keys.result() if self.keys else ()
            )
            references_s = clock.lap()
        latents, steps_s = self._denoise(text, references, clock)
        self._tell(Stage.DECODE, spec.num_inference_steps)
        pixels = self._decode(latents, references.source)
        timings = StageTimings(text_s, references_s, sum(steps_s), clock.lap(), steps_s)
        are_cached = references.are_cached
        kept = latents.float().cpu().numpy().tobytes() if spec.wants_latents else None
        del latents, references
        peak, held = clock.memory()
        return Generated(
            image=image_tensors.to_raw(pixels),
            timings=timings,
            peak=peak,
            prompt_tokens=text.tokens.count,
            is_prompt_cut=text.tokens.is_cut,
            is_prompt_cached=text.is_cached if components.cache.size else None,
            are_references_cached=are_cached,
            held=held,
            latents=kept,
        )

    def _denoise(
        self,
        text: Text,
        references: References,
        clock: _Clock,
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        shown = preview_steps(self.spec.previews, self.spec.num_inference_steps)
        shape = self.components.grid(self.spec)
        steps_s: list[float] = []

        def on_step(number: int, estimate: Callable[[], torch.Tensor]) -> None:
            picture = preview(self.components, estimate, shape) if number in shown else None
            steps_s.append(clock.lap())
            self.on_progress(
                Progress(Stage.DENOISE, number, self.spec.num_inference_steps, picture)
            )

        latents = denoise(
            self.components,
            self.spec,
            text,
            references,
            self.noise.result(),
            on_step=on_step,
            is_cancelled=self.is_cancelled,
        )
        return latents, tuple(steps_s)

    def _decode(self, latents: torch.Tensor, source: Source | None) -> torch.Tensor:
        made = decode(self.components, latents, self.components.grid(self.spec))
        if self.is_trial and not torch.isfinite(made).all():
            raise StartupError(NO_PICTURE)
        pixels = image_tensors.to_host(image_tensors.to_bytes(made))
        if source is not None:
            pixels = image_tensors.paste(pixels, source.pixels, source.mask)
        return pixels

    def _tell(self, stage: Stage, step: int) -> None:
        self.on_progress(Progress(stage, step, self.spec.num_inference_steps))


class _Clock:
    """Measures seconds between laps, GPU work included, and peak GPU memory since the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Wait for the GPU's work and return the seconds since the last lap.

        The copy of embeddings to their cache, on a stream of its own, may go on.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed

    def memory(self) -> tuple[PeakMemory | None, PeakMemory | None]:
        """Return PyTorch's peak and current GPU memory in bytes; None for both on the CPU."""
        if self._device.type != "cuda":
            return None, None
        # One call: PyTorch's functions for single statistics each compute all of them.
        figures = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved = (
            figures[f"{name}_bytes"]["all"] for name in ("allocated", "reserved")
        )
        return (
            PeakMemory(allocated["peak"], reserved["peak"]),
            PeakMemory(allocated["current"], reserved["current"]),
        )
