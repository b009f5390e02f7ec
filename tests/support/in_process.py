"""A runtime whose service, queue and dispatcher are the real ones, with no worker process: pictures
are made at once, or when the test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from app.domain import (
    Generated,
    ImageSpec,
    LoadProgress,
    ModelInfo,
    Progress,
    RawImage,
    StageTimings,
    WorkerStage,
    WorkerStatus,
)
from app.engine.models.flux2_klein import TOKENIZER
from app.engine.models.registry import find_spec
from app.jobs.dispatcher import Dispatcher
from app.jobs.estimate import Estimator
from app.jobs.queue import JobQueue
from app.jobs.rate_limit import RateLimit
from app.limits import Limits
from app.service.prompt_tokens import PromptTokens
from app.service.service import ImageService
from app.telemetry.metrics import Metrics
from tests.support.fakes import INFO, FakeDecoders


class Worker:
    """The worker's side as the service sees it, and a backend that makes grey pictures."""

    progress = LoadProgress(WorkerStage.READY)
    pid: int | None = 1
    restart_count = 0
    is_ready = True
    is_awaited = False
    state = "ready"
    reason = ""
    statuses: tuple[WorkerStatus, ...] = ()
    info: ModelInfo | None = INFO

    def __init__(self) -> None:
        self.made = 0
        self.is_prompt_cut = False
        self.errors: dict[int, Exception] = {}
        """What happens instead of the so-many-th picture, counted from 1."""
        self.release = asyncio.Event()
        """Pictures wait for it."""
        self.release.set()
        self.started = asyncio.Event()
        """Set once a picture has been begun."""

    async def wait_until_ready(self) -> None:
        """It is."""

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        """Make one picture that took a tenth of a second, as it says."""
        self.started.set()
        await self.release.wait()
        self.made += 1
        if self.made in self.errors:
            raise self.errors.pop(self.made)
        image = RawImage(spec.width, spec.height, bytes([spec.seed % 251]) * (3 * spec.pixels))
        return Generated(image, StageTimings(0.0, 0.0, 0.1, 0.0), None, 12, self.is_prompt_cut)


class InProcess:
    """What the app's lifespan needs, around the real service."""

    def __init__(
        self,
        *,
        capacity: int = 8,
        per_minute: int = 0,
        deadline_s: float = 120.0,
        has_metadata: bool = False,
        clock: Callable[[], float] = time.monotonic,
        model: str = "flux.2-klein-4b",
        scaled: Limits | None = None,
    ) -> None:
        self.worker = Worker()
        self.estimator = Estimator()
        self.queue = JobQueue(capacity, clock=clock)
        self.metrics = Metrics(version="0")
        self.decoders = FakeDecoders()
        self.tokens = PromptTokens(TOKENIZER, find_spec(model).max_sequence_length)
        self.service = ImageService(
            find_spec(model),
            Limits.of(find_spec(model), 4_194_304, scaled=scaled),
            self.queue,
            self.estimator,
            self.worker,
            self.metrics,
            RateLimit(per_minute, clock=clock),
            deadline_s=deadline_s,
            has_metadata=has_metadata,
            clock=clock,
        )
        self._dispatcher = Dispatcher(self.queue, self.worker, self.estimator)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> InProcess:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to take jobs."""
        self._task = asyncio.create_task(self._dispatcher.run())

    async def close(self) -> None:
        """Stop, and release the threads."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.service.close()
