"""The engine: owns the GPU and the loaded model, and generates one image at a time.

It knows specs and pixels, no queue, no process, no HTTP. It is not thread-safe. An image depends on
its spec alone: noise, scheduler and every buffer are created per image, and only pure functions of
the spec are cached.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
                loaded.components.adapters.trial(),
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
        components = self._started.components
        try:
            job = _Job(components, spec, self._helpers, on_progress, is_cancelled, is_trial)
            return job.run()
        except Exception as error:
            if error_mapping.is_out_of_memory(error):
                components.adapters.give_up()
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
    helpers: Executor
    on_progress: Callable[[Progress], None]
    is_cancelled: Callable[[], bool]
    is_trial: bool
    """Whether non-finite pixels are an error; the conversion to bytes would hide them."""

    def run(self) -> Generated:
        """Run the stages and measure the duration of each."""
        components, spec = self.components, self.spec
        clock = _Clock(components.device)
        text, noise, keys = self._begin()
        # While the GPU encodes the prompt.
        loads = components.adapters.select(spec.loras)
        clock.lap()
        references = References()
        if spec.references:
            self._tell(Stage.REFERENCE, 0)
            references = encode_references(components, spec, keys.result() if keys else ())
        clock.lap()
        steps = _Steps(clock, self.on_progress)
        latents = self._denoise(text, references, noise.result(), steps)
        steps.then(Progress(Stage.DECODE, spec.num_inference_steps, spec.num_inference_steps))
        decoded = decode(components, latents, components.grid(spec))
        steps.tell_all()
        pixels = self._to_pixels(decoded, references.source)
        clock.lap()
        text_s, references_s, *steps_s, decode_s = clock.seconds()
        timings = StageTimings(
            text_s,
            references_s if spec.references else 0.0,
            sum(steps_s),
            decode_s,
            tuple(steps_s),
        )
        are_cached = references.are_cached
        kept = latents.float().cpu().numpy().tobytes() if spec.wants_latents else None
        del latents, references, decoded
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
            lora_loads=loads,
            lora_bytes=components.adapters.size_bytes,
            latents=kept,
        )

    def _begin(self) -> tuple[Text, Future[torch.Tensor], Future[tuple[ReferenceKey, ...]] | None]:
        """Encode the prompt; have helpers draw the noise and find the references' keys meanwhile.

        There are no keys where no references are cached.
        """
        components, spec = self.components, self.spec
        # A GPU idles until it has the prompt, which any other thread that runs would delay. On the
        # CPU, and where layers have to come first, the call lasts as long as the stage.
        is_first = components.device.type == "cuda" and components.holds_encoder
        text = encode_text(components, spec) if is_first else None
        self._tell(Stage.TEXT, 0)
        noise = self.helpers.submit(draw_noise, components, spec)
        is_looked_up = spec.references and components.references.size
        keys = self.helpers.submit(reference_keys, spec) if is_looked_up else None
        return text or encode_text(components, spec), noise, keys

    def _denoise(
        self, text: Text, references: References, noise: torch.Tensor, steps: _Steps
    ) -> torch.Tensor:
        shown = preview_steps(self.spec.previews, self.spec.num_inference_steps)
        shape = self.components.grid(self.spec)

        def on_step(number: int, estimate: Callable[[], torch.Tensor]) -> None:
            picture = preview(self.components, estimate, shape) if number in shown else None
            steps.end(Progress(Stage.DENOISE, number, self.spec.num_inference_steps, picture))

        return denoise(
            self.components,
            self.spec,
            text,
            references,
            noise,
            on_step=on_step,
            is_cancelled=self.is_cancelled,
        )

    def _to_pixels(self, made: torch.Tensor, source: Source | None) -> torch.Tensor:
        if self.is_trial and not torch.isfinite(made).all():
            raise StartupError(NO_PICTURE)
        pixels = image_tensors.to_host(image_tensors.to_bytes(made))
        if source is not None:
            pixels = image_tensors.paste(pixels, source.pixels, source.mask)
        return pixels

    def _tell(self, stage: Stage, step: int) -> None:
        self.on_progress(Progress(stage, step, self.spec.num_inference_steps))


class _Steps:
    """Tells of denoising steps that the GPU has done; the host prepares one step beyond."""

    def __init__(self, clock: _Clock, on_progress: Callable[[Progress], None]) -> None:
        self._clock, self._on_progress = clock, on_progress
        self._untold: deque[tuple[int, Progress]] = deque()
        self._last = 0

    def end(self, progress: Progress) -> None:
        """Take note of a step whose work was given to the GPU; wait for the one before."""
        self._last = self._clock.lap()
        self.then(progress)
        while len(self._untold) > 1:
            self._tell()

    def then(self, progress: Progress) -> None:
        """Tell *progress* once the last step is over: at once, if it is."""
        self._untold.append((self._last, progress))
        while self._untold and self._clock.is_over(self._untold[0][0]):
            self._tell()

    def tell_all(self) -> None:
        """Wait for the last step, and tell of all."""
        while self._untold:
            self._tell()

    def _tell(self) -> None:
        lap, progress = self._untold.popleft()
        self._clock.wait(lap)
        self._on_progress(progress)


class _Clock:
    """Measures seconds between laps by the GPU's own clock, and peak GPU memory since the start.

    A lap ends when the GPU has done what it was given until then, for which the host need not wait:
    a GPU that must wait for the host at the end of each lap idles until more is launched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._ends: list[Any] = []
        self.lap()

    def lap(self) -> int:
        """End a lap and return its number; the first begins with the clock."""
        end: Any = time.perf_counter()
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        return len(self._ends) - 1

    def is_over(self, lap: int) -> bool:
        """Return whether the GPU has done the work of *lap*."""
        return self._device.type != "cuda" or bool(self._ends[lap].query())

    def wait(self, lap: int) -> None:
        """Wait until `is_over`; the copy of embeddings to their cache may go on."""
        if self._device.type == "cuda":
            self._ends[lap].synchronize()

    def seconds(self) -> list[float]:
        """Wait for the last lap and return the seconds of all."""
        self.wait(len(self._ends) - 1)
        pairs = itertools.pairwise(self._ends)
        if self._device.type != "cuda":
            return [end - begun for begun, end in pairs]
        return [begun.elapsed_time(end) / 1e3 for begun, end in pairs]

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
