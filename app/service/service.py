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
from typing import Protocol

from app import images
from app.domain import (
    Generated,
    ImageSpec,
    LoadProgress,
    ModelInfo,
    ModelSpec,
    PeakMemory,
    RawImage,
    Status,
    WorkerStage,
    WorkerStatus,
)
from app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Kind,
    KleinError,
    OutOfMemory,
    Unavailable,
)
from app.images import OutputFormat
from app.jobs.job import Job
from app.jobs.queue import JobQueue
from app.jobs.rate_limit import RateLimit
from app.limits import Limits, room
from app.request_context import current_request
from app.service.adapters import Adapters
from app.service.recipes import write_recipe
from app.service.results import Picture, describe_loras, warnings_of
from app.service.ticket import Admission, Ticket, Tickets
from app.telemetry.metrics import Metrics

_TOO_SLOW = (
    "The request took so long to arrive and to be read that its deadline cannot be met; send "
    "it faster, send less, or allow more time."
)
_WAITS = frozenset({"queue", "total"})
_HELPERS = min(7, os.cpu_count() or 1)
"""Threads beside the one that encodes, by the number of cores.

As many as cores leave none idle where two threads share one at first; more than seven find no strip
left in the file of one megapixel.
"""


class WorkerState(Protocol):
    """What the service reads of its workers' state, of all together."""

    @property
    def progress(self) -> LoadProgress:
        """The stage of the one that is furthest."""

    @property
    def info(self) -> ModelInfo | None:
        """What the first has loaded, with the largest sizes of any of them."""

    @property
    def restart_count(self) -> int:
        """How many times one was started again."""

    @property
    def statuses(self) -> tuple[WorkerStatus, ...]:
        """The state of each."""

    @property
    def is_ready(self) -> bool:
        """Whether a job could start."""

    @property
    def is_awaited(self) -> bool:
        """Whether none is ready, but one sleeps or wakes, so that a job that waits will start."""

    @property
    def state(self) -> str:
        """In one word, as far as sleep explains it: ready, waking, asleep, yielding or empty."""

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""


class Predictor(Protocol):
    """Predicts how long an image takes."""

    def predict(self, spec: ImageSpec) -> float:
        """Predict the seconds of *spec* on the fastest device."""


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
        limits: Limits,
        queue: JobQueue,
        estimator: Predictor,
        worker: WorkerState,
        metrics: Metrics,
        rates: RateLimit,
        *,
        deadline_s: float,
        has_metadata: bool,
        adapters: Adapters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.limits = limits
        self.adapters = adapters or Adapters()
        self._deadline_s = deadline_s
        self._has_metadata = has_metadata
        self._queue = queue
        self._estimator = estimator
        self._worker = worker
        self._metrics = metrics
        self._rates = rates
        self._clock = clock
        self._encoders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
        self._helpers = ThreadPoolExecutor(_HELPERS, thread_name_prefix="encode helper")
        self._is_draining = False
        self._tickets = Tickets()
        self.held_memory: dict[str, PeakMemory] = {}
        """PyTorch's GPU memory after the last image, by the device's UUID."""
        self._longest_deadline = 0.0

    def status(self) -> Status:
        """Return the service's current state."""
        worker = self._worker
        is_leaving = self._is_draining and worker.progress.stage != WorkerStage.FAILED
        return Status(
            stage=WorkerStage.DRAINING if is_leaving else worker.progress.stage,
            is_ready=(worker.is_ready or worker.is_awaited) and not self._is_draining,
            progress=worker.progress.fraction,
            reason="The service is shutting down." if is_leaving else worker.reason,
            info=worker.info,
            queue_size=self._queue.size,
            queue_capacity=self._queue.capacity,
            running=self._queue.running,
            estimated_wait_s=self._queue.expected_wait_s(),
            worker_restarts=worker.restart_count,
            workers=worker.statuses,
            state=WorkerStage.DRAINING if is_leaving else worker.state or worker.progress.stage,
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
            places = self._queue.reserve(
                client, 1, retry_after_s=self._retry_after_s(), is_early=True
            )
            self._rates.take(client, 1)
        return Admission(self, self._queue, client, self._clock(), deadline_s, places)

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
                f"images is {images}, but at most {self._queue.capacity} images may wait here; "
                "ask for fewer at a time.",
                param="images",
            )
        retry_s, worker = self._retry_after_s(), self._worker
        if self._is_draining:
            raise Unavailable.because("The service is shutting down", Kind.DRAINING, retry_s)
        if worker.state == "yielding":
            raise Unavailable(worker.reason, kind=Kind.WORKER_DOWN, retry_after_s=retry_s)
        if worker.info is None:
            raise Unavailable.because("The model is still being loaded", Kind.LOADING, retry_s)
        if images > held:
            self._queue.check_room(client, images - held, retry_after_s=retry_s)
        if not (worker.is_ready or worker.is_awaited):
            raise Unavailable.because("The worker is being restarted", Kind.WORKER_DOWN, retry_s)

    def _check_rate(self, client: str, images: int, held: int) -> None:
        limit = self._rates.per_minute
        if limit and images > limit:
            raise InvalidRequest(
                f"images is {images}, but at most {limit} images in a minute may be asked for "
                "here; ask for fewer at a time.",
                param="images",
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
        self.limits.check(spec)
        count = len(spec.references)
        info, limit = self._worker.info, self.limits.max_pixels
        if info is not None:
            limit = int(min(limit, room(info.max_pixels, count)))
        if spec.pixels > limit:
            side = math.isqrt(limit) // self.limits.multiple * self.limits.multiple
            beside = f" with {count} reference images" if count else ""
            raise InvalidRequest(
                f"{spec.width}x{spec.height} is more than this service can make{beside}; "
                f"the most is {limit} pixels, for example {side}x{side}.",
                param="width",
            )

    def random_seed(self) -> int:
        """Draw a random seed."""
        return secrets.randbelow(self.limits.max_seed + 1)

    def submit(self, specs: Sequence[ImageSpec], *, client: str, output: OutputFormat) -> Ticket:
        """Queue all of *specs*, which arrive now, or none.

        Raises:
            KleinError: as `admit` and `Admission.submit`.
        """
        with self.admit(client=client) as admission:
            return admission.submit(specs, output)

    def own_tickets(self, client: str) -> dict[Ticket, int | None]:
        """Map each ticket of *client* that has not ended to how many jobs start before it.

        None stands for one that has started.
        """
        positions = self._queue.positions(client)
        return {each: positions.get(each.jobs[0]) for each in self._tickets.of(client)}

    def find_ticket(self, client: str, id: str) -> Ticket | None:
        """Return the ticket of *client* that has this *id* and has not ended."""
        return self._tickets.find(client, id)

    def drain(self) -> float:
        """Accept nothing new; return the seconds until the last accepted job's deadline."""
        self._is_draining = True
        return max(0.0, self._longest_deadline - self._clock())

    def close(self) -> None:
        """End the encoding threads."""
        self._encoders.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True, cancel_futures=True)

    # For Admission.

    def reserve(self, admission: Admission, images: int) -> None:
        """Reserve the places and tokens of a request before its images are decoded."""
        client, places = admission.client, admission.places
        held = 0 if places is None else places.images
        self._check_open(images, client, held=held)
        left_s = self.seconds_left(admission)
        if left_s <= 0:
            raise DeadlineExceeded(_TOO_SLOW)
        if places is None:
            admission.places = self._queue.reserve(
                client, images, retry_after_s=self._retry_after_s()
            )
        else:
            self._queue.widen(places, images, retry_after_s=self._retry_after_s())
        self._rates.take(client, images - held)
        self._longest_deadline = max(self._longest_deadline, self._clock() + left_s)

    def seconds_left(self, admission: Admission, predicted_s: float = 0.0) -> float:
        """Return the seconds to the deadline of a request whose work takes *predicted_s*."""
        allowed_s = self._deadline_s + 4 * predicted_s
        if admission.deadline_s is not None:
            allowed_s = min(allowed_s, admission.deadline_s)
        return admission.arrived_at + allowed_s - self._clock()

    def start(
        self, admission: Admission, specs: Sequence[ImageSpec], output: OutputFormat
    ) -> Ticket:
        """Make jobs of *specs* and queue them, in the places that were reserved or in any."""
        places = admission.places
        for spec in specs:
            self.check(spec)
        if places is None:
            self._check_open(len(specs), admission.client)
        predicted_s = [self._estimator.predict(spec) for spec in specs]
        deadline = self._clock() + self._checked_seconds_left(admission, predicted_s)
        jobs = [
            Job(
                id=secrets.token_hex(8),
                spec=spec,
                client=admission.client,
                deadline=deadline,
                future=asyncio.get_running_loop().create_future(),
                predicted_s=seconds,
                warnings=admission.warnings,
            )
            for spec, seconds in zip(specs, predicted_s, strict=True)
        ]
        if places is None:
            self._queue.submit(jobs, retry_after_s=self._retry_after_s())
            self._rates.take(admission.client, len(jobs))
        else:
            self._queue.fill(places, jobs)
        self._longest_deadline = max(self._longest_deadline, deadline)
        context = current_request.get(None)
        if context is not None:
            context.loras = tuple(lora.name for lora in specs[0].loras)
        ticket = Ticket(self, self._queue, jobs, output, context.id if context else "")
        self._tickets.add(ticket)
        return ticket

    def _checked_seconds_left(self, admission: Admission, works_s: Sequence[float]) -> float:
        """Return the seconds to the deadline; raise an error where the request cannot meet it."""
        asked_s, predicted_s = admission.deadline_s, self._queue.span_s(works_s)
        if asked_s is not None and asked_s < predicted_s:
            raise InvalidRequest(
                f"The deadline of {asked_s:g} s is shorter than the {predicted_s:.1f} s "
                "that this takes here; allow more, or ask for fewer steps or a smaller size.",
                param="deadline_s",
            )
        left_s = self.seconds_left(admission, predicted_s)
        if left_s < predicted_s:
            raise DeadlineExceeded(_TOO_SLOW)
        self._queue.check_time(
            admission.client,
            works_s,
            left_s,
            retry_after_s=self._retry_after_s(),
            # A deadline that the client chose may be one that can never be met.
            has_claim=asked_s is None,
        )
        return left_s

    # For Ticket.

    async def encode(
        self,
        image: RawImage,
        output: OutputFormat,
        note: dict[str, str],
        size: tuple[int, int] | None,
    ) -> bytes:
        """Scale to *size* and encode in a thread, while the GPU and the event loop continue."""
        return await asyncio.get_running_loop().run_in_executor(
            self._encoders,
            images.encode,
            image,
            output,
            note if self._has_metadata else None,
            self._helpers,
            size,
        )

    def wakes_in_s(self) -> float | None:
        """Return the predicted seconds until a worker is awake; None where none has to wake."""
        return self._queue.starts_in_s() if self._worker.is_awaited else None

    async def finish(self, job: Job, output: OutputFormat) -> Picture:
        """Wait for *job*, encode its image, and count it."""
        try:
            # Shielded: cancelling this wait must leave the job to the queue, which alone ends it.
            generated = await asyncio.shield(job.future)
        except OutOfMemory:
            self._metrics.images_out_of_memory.inc()
            raise
        if generated.held is not None:
            self.held_memory[job.device.uuid] = generated.held
        started = self._clock()
        spec, image = job.spec, generated.image
        data = await self.encode(image, output, self._note(job), spec.scaled_to)
        now = self._clock()
        seconds = {
            "queue": job.started_at - job.submitted_at,
            "text": generated.timings.text,
            "reference": generated.timings.reference,
            "denoise": generated.timings.denoise,
            "decode": generated.timings.decode,
            "encode": now - started,
            "total": now - job.submitted_at,
        }
        _note(seconds)
        _trace(self.model.id, job, seconds)
        mode = "edit" if spec.references else "generate"
        self._metrics.image_finished(generated, seconds, mode, job.device)
        width, height = spec.scaled_to or (image.width, image.height)
        return Picture(
            data=data,
            format=output.format,
            media_type=output.media_type,
            width=width,
            height=height,
            seed=spec.seed,
            seconds=seconds,
            peak=generated.peak,
            prompt_tokens=generated.prompt_tokens,
            warnings=(*job.warnings, *warnings_of(spec), *self._warnings(generated)),
            loras=spec.loras,
            latents=generated.latents,
            device=job.device.name,
        )

    def _warnings(self, generated: Generated) -> tuple[str, ...]:
        most = self.model.max_sequence_length
        return (f"prompt cut to {most} tokens",) if generated.is_prompt_cut else ()

    def _info_of(self, job: Job) -> ModelInfo | None:
        """Return what the worker that made *job* has loaded."""
        workers = self._worker.statuses
        found = (each.info for each in workers if each.device is job.device and each.info)
        return next(found, self._worker.info)

    def _note(self, job: Job) -> dict[str, str]:
        """Return the metadata written into the image."""
        info, fused = self._info_of(job), self.adapters.fused
        facts = {
            "precision": info.precision if info else "",
            "device": job.device.name,
            **_raced(info),
            **({"fused_loras": describe_loras(fused)} if fused else {}),
        }
        return write_recipe(job.spec, self.model.id, facts)

    def _retry_after_s(self) -> int:
        """Return the `Retry-After`: the expected wait, with jitter, within 1..60 s."""
        wait_s = math.ceil(self._queue.expected_wait_s())
        if not self._worker.is_ready:
            wait_s = max(wait_s, 5)
        return max(1, min(60, wait_s + random.randint(0, 1 + wait_s // 4)))


def _raced(info: ModelInfo | None) -> dict[str, str]:
    """Return the attention's kernel and the race's times, where there are any, for an image."""
    if info is None or not info.attention:
        return {}
    times = "; ".join(
        f"{part} {', '.join(f'{name} {ms:.1f} ms' for name, ms in laps.items())}"
        for part, laps in info.race.items()
    )
    return {"attention": info.attention} | ({"race": times} if times else {})


def _trace(model: str, job: Job, seconds: Mapping[str, float]) -> None:
    """Add a finished image to its request's trace, if there is one."""
    context = current_request.get(None)
    if context is not None and context.trace is not None:
        context.trace.picture_made(model, job.spec, seconds, job.device)


def _note(seconds: Mapping[str, float]) -> None:
    """Add an image's stage times to its request's log line.

    Of several images, the line has the sum of GPU times and the longest wait.
    """
    context = current_request.get(None)
    if context is None:
        return
    notes = context.notes
    notes["images"] = notes.get("images", 0) + 1
    for stage, value in seconds.items():
        before = notes.get(f"{stage}_s", 0.0)
        notes[f"{stage}_s"] = round(max(before, value) if stage in _WAITS else before + value, 4)
