"""The service: check a spec against the limits, queue it, encode the image, count it.

It knows no HTTP and no torch. A request becomes a `Ticket` of one job per image; a ticket is
accepted whole or not at all, and ends once: with every image, or with the first error.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from app import images, limits, logs
from app.domain import (
    Generated,
    ImageSpec,
    ModelInfo,
    ModelSpec,
    PeakMemory,
    RawImage,
    WorkerStage,
)
from app.errors import (
    InvalidRequest,
    Kind,
    KleinError,
    OutOfMemory,
    Unavailable,
)
from app.images import OutputFormat
from app.jobs.estimate import Estimator
from app.jobs.job import Job
from app.jobs.queue import JobQueue, Places
from app.jobs.rate_limit import RateLimit
from app.service.admission import Admission, too_slow
from app.service.results import Picture, Status
from app.service.ticket import Ticket
from app.telemetry.metrics import Metrics

_WAITS = frozenset({"queue", "total"})


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """The service's limits and timeouts, in seconds and pixels."""

    deadline_s: float
    max_pixels: int
    has_metadata: bool


class WorkerState(Protocol):
    """What the service reads of the worker's state."""

    stage: WorkerStage
    info: ModelInfo | None
    restart_count: int

    @property
    def is_ready(self) -> bool:
        """Whether a job could start."""

    @property
    def load_progress(self) -> float | None:
        """The progress of loading the model, 0..1, where it is known."""

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""


def warm_up_spec(model: ModelSpec) -> ImageSpec:
    """Return the spec of the worker's warm-up image: the model's defaults, always the same."""
    return ImageSpec(
        prompt="a red circle on a blue background",
        width=model.default_width,
        height=model.default_height,
        num_inference_steps=model.default_steps,
        guidance_scale=model.default_guidance,
        seed=0,
    )


class ImageService:
    """Accepts, queues and encodes images; used from the event loop's thread only.

    `drain` ends acceptance; what was accepted is finished.
    """

    def __init__(
        self,
        model: ModelSpec,
        config: ServiceConfig,
        queue: JobQueue,
        estimator: Estimator,
        worker: WorkerState,
        metrics: Metrics,
        rates: RateLimit,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self._config = config
        self._queue = queue
        self._estimator = estimator
        self._worker = worker
        self._metrics = metrics
        self._rates = rates
        self._clock = clock
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
        self._helpers = ThreadPoolExecutor(_helper_count(), thread_name_prefix="encode helper")
        self._is_draining = False
        self.held_memory: PeakMemory | None = None
        """PyTorch's GPU memory after the last image."""
        self._longest_deadline = 0.0

    def status(self) -> Status:
        """Return the service's current state."""
        worker = self._worker
        is_leaving = self._is_draining and worker.stage != WorkerStage.FAILED
        return Status(
            stage=WorkerStage.DRAINING if is_leaving else worker.stage,
            is_ready=worker.is_ready and not self._is_draining,
            progress=worker.load_progress,
            reason="The service is shutting down." if is_leaving else worker.reason,
            info=worker.info,
            queue_size=self._queue.size,
            queue_capacity=self._queue.capacity,
            running=self._queue.running,
            estimated_wait_s=self._queue.expected_wait_s(),
            worker_restarts=worker.restart_count,
        )

    def admit(
        self, *, client: str, deadline_s: float | None = None, is_large: bool = False
    ) -> Admission:
        """Register a request that arrives now, before anything of it is read.

        *deadline_s* may only shorten the deadline. A request whose body *is_large*, and so takes
        its time to read, holds the place and the token of its first image from here on.

        Raises:
            Unavailable: there is no room for one image more now.
            KleinError: *client* has exceeded its rate.
        """
        self._check_open(1, client)
        places = None
        if is_large:
            retry_s = self._retry_after_s()
            places = self._queue.reserve(client, 1, retry_after_s=retry_s, is_early=True)
            self._rates.take(client, 1)
        return Admission(self, client, self._clock(), deadline_s, places)

    def _check_open(self, images: int, client: str, *, held: int = 0) -> None:
        """Refuse *images*, of which *held* have their place already, if there is no room for them.

        Raises:
            InvalidRequest: they would not fit into the empty queue either.
            Unavailable: there is no room for them now.
            KleinError: *client* has exceeded its rate.
        """
        self._check_rate(client, images, held)
        if images > self._queue.capacity:
            raise InvalidRequest(
                f"n is {images}, but at most {self._queue.capacity} images may wait here; "
                "ask for fewer at a time.",
                param="n",
            )
        retry_s = self._retry_after_s()
        if self._is_draining:
            raise self._unavailable(Kind.DRAINING, "The service is shutting down", retry_s)
        if self._worker.info is None:
            raise self._unavailable(Kind.LOADING, "The model is still being loaded", retry_s)
        if images > held:
            self._queue.check_room(client, images - held, retry_after_s=retry_s)
        if not self._worker.is_ready:
            raise self._unavailable(Kind.WORKER_DOWN, "The worker is being restarted", retry_s)

    def _check_rate(self, client: str, images: int, held: int) -> None:
        limit = self._rates.per_minute
        if limit and images > limit:
            raise InvalidRequest(
                f"n is {images}, but at most {limit} images in a minute may be asked for here; "
                "ask for fewer at a time.",
                param="n",
            )
        if wait_s := self._rates.wait_s(client, images - held):
            raise KleinError(
                f"At most {limit} images in a minute may be asked for here; "
                f"try again in {wait_s} s.",
                kind=Kind.RATE_LIMITED,
                retry_after_s=wait_s,
            )

    def check(self, spec: ImageSpec) -> None:
        """Refuse what the model or the memory plan does not support, naming what they do.

        Raises:
            InvalidRequest: with the field's name.
        """
        limits.check_spec(spec, self.model, self._config.max_pixels)
        self._check_memory(spec)

    def _check_memory(self, spec: ImageSpec) -> None:
        count = len(spec.references)
        if count > self.model.max_references:
            raise InvalidRequest(
                f"{count} reference images were sent, but {self.model.id} takes at most "
                f"{self.model.max_references}.",
                param="image",
                code="array_above_max_length",
            )
        limit = self.max_pixels(count)
        if spec.pixels > limit:
            side = math.isqrt(limit) // 16 * 16
            beside = f" with {count} reference images" if count else ""
            raise InvalidRequest(
                f"{spec.width}x{spec.height} is more than this service can make{beside}; "
                f"the most is {limit} pixels, for example {side}x{side}.",
                param="size",
            )

    def max_pixels(self, references: int) -> int:
        """Return the largest output, in pixels, beside so many references; 0 where none fits."""
        limit = min(self.model.max_pixels, self._config.max_pixels)
        info = self._worker.info
        if info is None or not info.max_pixels:
            return limit
        return min(limit, info.max_pixels[min(references, len(info.max_pixels) - 1)])

    def predict_s(self, specs: Sequence[ImageSpec]) -> float:
        """Return the predicted seconds of *specs* on the GPU, one after the other."""
        return sum(self._estimator.predict(spec) for spec in specs)

    def random_seed(self) -> int:
        """Draw a random seed."""
        return secrets.randbelow(limits.MAX_SEED + 1)

    def submit(self, specs: Sequence[ImageSpec], *, client: str, output: OutputFormat) -> Ticket:
        """Queue all of *specs*, which arrive now, or none.

        Raises:
            KleinError: as `admit` and `Admission.submit`.
        """
        with self.admit(client=client) as admission:
            return admission.submit(specs, output)

    def drain(self) -> float:
        """Accept nothing new; return the seconds until the last accepted job's deadline."""
        self._is_draining = True
        return max(0.0, self._longest_deadline - self._clock())

    async def wait_until_idle(self) -> None:
        """Return once everything accepted has ended."""
        await self._queue.wait_until_empty()

    def close(self) -> None:
        """End the encoding threads."""
        self._encoders.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True, cancel_futures=True)

    # For Admission.

    def reserve(self, admission: Admission, places: Places | None, images: int) -> Places:
        """Reserve the places and tokens of a request before its images are decoded.

        *places* are those that it has already.
        """
        client, held = admission.client, 0 if places is None else places.images
        self._check_open(images, client, held=held)
        left_s = self.seconds_left(admission)
        if left_s <= 0:
            raise too_slow()
        retry_s = self._retry_after_s()
        if places is None:
            places = self._queue.reserve(client, images, retry_after_s=retry_s)
        else:
            self._queue.widen(places, images, retry_after_s=retry_s)
        self._rates.take(client, images - held)
        self._longest_deadline = max(self._longest_deadline, self._clock() + left_s)
        return places

    def seconds_left(self, admission: Admission, predicted_s: float = 0.0) -> float:
        """Return the seconds to the deadline of a request whose work takes *predicted_s*."""
        allowed_s = self._config.deadline_s + 4 * predicted_s
        if admission.deadline_s is not None:
            allowed_s = min(allowed_s, admission.deadline_s)
        return admission.arrived_at + allowed_s - self._clock()

    def start(
        self,
        admission: Admission,
        places: Places | None,
        specs: Sequence[ImageSpec],
        output: OutputFormat,
    ) -> Ticket:
        """Make jobs of *specs* and queue them, in *places* or in any."""
        for spec in specs:
            self.check(spec)
        if places is None:
            self._check_open(len(specs), admission.client)
        deadline = self._clock() + self._checked_seconds_left(admission, self.predict_s(specs))
        loop = asyncio.get_running_loop()
        jobs = [
            Job(
                id=secrets.token_hex(8),
                spec=spec,
                client=admission.client,
                deadline=deadline,
                future=loop.create_future(),
                predicted_s=self._estimator.predict(spec),
            )
            for spec in specs
        ]
        if places is None:
            self._queue.submit(jobs, retry_after_s=self._retry_after_s())
            self._rates.take(admission.client, len(jobs))
        else:
            self._queue.fill(places, jobs)
        self._longest_deadline = max(self._longest_deadline, deadline)
        return Ticket(self, jobs, output)

    def _checked_seconds_left(self, admission: Admission, predicted_s: float) -> float:
        """Return the seconds to the deadline; raise an error where the request cannot meet it."""
        asked_s = admission.deadline_s
        if asked_s is not None and asked_s < predicted_s:
            raise InvalidRequest(
                f"The deadline of {asked_s:g} s is shorter than the {predicted_s:.1f} s "
                "that this takes here; allow more, or ask for fewer steps or a smaller size.",
                param="X-Klein-Deadline-S",
            )
        left_s = self.seconds_left(admission, predicted_s)
        if left_s < predicted_s:
            raise too_slow()
        self._queue.check_time(
            admission.client,
            predicted_s,
            left_s,
            retry_after_s=self._retry_after_s(),
            # A deadline that the client chose may be one that can never be met.
            has_claim=asked_s is None,
        )
        return left_s

    # For Ticket.

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel *jobs*, whose client has disconnected."""
        for job in jobs:
            self._queue.cancel(job)

    def position(self, job: Job) -> int:
        """Return how many jobs start before *job*."""
        return self._queue.position(job)

    async def encode(self, image: RawImage, output: OutputFormat, note: dict[str, str]) -> bytes:
        """Encode in a thread, while the GPU and the event loop continue."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._encoders,
            images.encode,
            image,
            output,
            note if self._config.has_metadata else None,
            self._helpers,
        )

    async def finish(self, job: Job, output: OutputFormat) -> Picture:
        """Wait for *job*, encode its image, and count it."""
        try:
            # Shielded: cancelling this wait must leave the job to the queue, which alone ends it.
            generated = await asyncio.shield(job.future)
        except OutOfMemory:
            self._metrics.image_out_of_memory()
            raise
        self.held_memory = generated.held
        started = self._clock()
        data = await self.encode(generated.image, output, self._note(job.spec))
        now = self._clock()
        seconds = {
            "queue": job.queued_s or 0.0,
            "text": generated.timings.text,
            "reference": generated.timings.reference,
            "denoise": generated.timings.denoise,
            "decode": generated.timings.decode,
            "encode": now - started,
            "total": now - job.submitted_at,
        }
        _note(seconds)
        self._metrics.image_finished(
            generated, seconds, "edit" if job.spec.references else "generate"
        )
        return Picture(
            data=data,
            format=output.format,
            media_type=output.media_type,
            width=generated.image.width,
            height=generated.image.height,
            seed=job.spec.seed,
            seconds=seconds,
            peak=generated.peak,
            prompt_tokens=generated.prompt_tokens,
            warnings=self._warnings(generated),
            latents=generated.latents,
        )

    def _warnings(self, generated: Generated) -> tuple[str, ...]:
        if generated.is_prompt_cut:
            return (f"prompt cut to {self.model.max_sequence_length} tokens",)
        return ()

    def _note(self, spec: ImageSpec) -> dict[str, str]:
        """Return the metadata written into the image; references and masks are not."""
        info = self._worker.info
        return {
            "prompt": spec.prompt,
            "seed": str(spec.seed),
            "steps": str(spec.num_inference_steps),
            "guidance": str(spec.guidance_scale),
            "size": f"{spec.width}x{spec.height}",
            "model": self.model.id,
            "precision": info.precision if info else "",
        }

    def _unavailable(self, kind: Kind, what: str, retry_s: int) -> Unavailable:
        return Unavailable(f"{what}; try again in {retry_s} s.", kind=kind, retry_after_s=retry_s)

    def _retry_after_s(self) -> int:
        """Return the `Retry-After`: the expected wait, with jitter, within 1..60 s."""
        wait_s = math.ceil(self._queue.expected_wait_s())
        if not self._worker.is_ready:
            wait_s = max(wait_s, 5)
        jitter_s = random.randint(0, 1 + wait_s // 4)
        return max(1, min(60, wait_s + jitter_s))


def _helper_count() -> int:
    """Return the number of threads beside the one that encodes, by the number of cores.

    As many as cores leave none idle where two threads share one at first; more than seven find no
    strip left in the file of one megapixel.
    """
    return min(7, os.cpu_count() or 1)


def _note(seconds: Mapping[str, float]) -> None:
    """Add an image's stage times to its request's log line.

    Of several images, the line has the sum of GPU times and the longest wait.
    """
    notes = logs.request_notes.get()
    if notes is None:
        return
    notes["images"] = notes.get("images", 0) + 1
    for stage, value in seconds.items():
        before = notes.get(f"{stage}_s", 0.0)
        together = max(before, value) if stage in _WAITS else before + value
        notes[f"{stage}_s"] = round(together, 4)
