"""The composition root: settings in, a running service out; started in order, closed in reverse.

Nothing else builds these objects and nothing here decides for them. Tests pass another
*make_engine*; no setting selects one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app import __version__
from app.domain import GpuSnapshot, ModelInfo
from app.engine import create_engine
from app.engine.catalog import CATALOG, card
from app.engine.config import EngineConfig
from app.errors import DeadlineExceeded, Kind, StartupError, Unavailable
from app.images.pool import DecoderPool
from app.jobs.dispatcher import Dispatcher
from app.jobs.estimate import Estimator
from app.jobs.queue import JobQueue
from app.jobs.rates import RateLimit
from app.service import ImageService, ServiceConfig, warm_up_spec
from app.settings import Settings, complete_path
from app.telemetry.gpu import Card
from app.telemetry.lag import LoopLag
from app.telemetry.metrics import Metrics
from app.telemetry.preflight import check_card, torch_cuda
from app.worker.child import EngineFactory
from app.worker.supervisor import Limits, Supervisor

_log = logging.getLogger(__name__)

KLEIN = "flux.2-klein-4b"
DEMO = "shapes"
SMALLEST_CARD_BYTES = 5_500_000_000
"""A card sold with 6 GB; the smallest plan needs about 5."""

DOWNLOAD_GRACE_S = 60.0
"""How much longer than `KLEIN_DOWNLOAD_SILENCE_S` the worker may say nothing of a download: unless
it hangs, it gives up by itself and says why."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Why the service cannot go on: the process's exit code and one sentence."""

    exit_code: int
    message: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Which model is served, from where, and why."""

    key: str
    path: str | None
    reason: str


def choose_model(settings: Settings, card_now: GpuSnapshot | None) -> Choice:
    """Decide what `KLEIN_MODEL` means on this machine.

    Raises:
        StartupError: it is neither a catalogue key nor a path that exists.
    """
    name = settings.model
    if name == "auto":
        if settings.device == "cpu":
            return Choice(DEMO, None, "KLEIN_DEVICE is cpu")
        if card_now is None:
            return Choice(DEMO, None, "no CUDA card was found")
        if card_now.total_bytes < SMALLEST_CARD_BYTES:
            return Choice(DEMO, None, f"{card_now.name} has less than 6 GB")
        return Choice(KLEIN, None, f"{card_now.name} can hold it")
    if name in CATALOG:
        return Choice(name, None, "KLEIN_MODEL names it")
    if "/" in name or name.startswith(".") or os.path.lexists(name):
        try:
            path = complete_path(Path(name))
        except ValueError as error:
            raise StartupError(f"KLEIN_MODEL is a path that cannot be used: {error}.") from None
        if not os.access(path, os.F_OK):
            raise StartupError(
                "KLEIN_MODEL is a path at which there is nothing; correct it and start again."
            )
        return Choice(card(settings.variant).id, str(path.resolve()), "KLEIN_MODEL is a path")
    return Choice(card(name).id, None, "KLEIN_MODEL names it")


def choose_device(settings: Settings, choice: Choice, gpu: Card) -> int | None:
    """Decide which card is used, None for the processor.

    The demo model runs without a card too, unless one was asked for by number.

    Raises:
        StartupError: the card cannot be used.
    """
    if settings.device == "cpu":
        return None
    if choice.key == DEMO and choice.path is None:
        is_asked_for = "device" in settings.model_fields_set
        return settings.device if is_asked_for or gpu.read() is not None else None
    check_card(gpu, settings.device, torch_cuda())
    return settings.device


class Runtime:
    """One service from start to close. `ended` is set when it cannot go on."""

    def __init__(self, settings: Settings, make_engine: EngineFactory, gpu: Card) -> None:
        self.choice = choose_model(settings, gpu.read() if settings.device != "cpu" else None)
        device = choose_device(settings, self.choice, gpu)
        self.model = card(self.choice.key)
        self.metrics = Metrics(version=__version__)
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.on_ready: list[Callable[[ModelInfo], None]] = []
        self._gpu = gpu
        self._lag = LoopLag()
        self._estimator = Estimator()
        self._queue = JobQueue(settings.queue_images)
        self._worker = Supervisor(
            make_engine,
            _engine_config(settings, self.choice, device),
            self,
            predict_step_s=self._estimator.predict_step,
            limits=Limits(
                load_s=settings.load_limit_s,
                download_s=settings.download_silence_s + DOWNLOAD_GRACE_S,
                silence_s=settings.watchdog_s,
            ),
            log=(settings.log_format, settings.log_level),
        )
        self.decoders = DecoderPool()
        self._dispatcher = Dispatcher(self._queue, self._worker, self._estimator)
        self.service = ImageService(
            self.model,
            ServiceConfig(settings.deadline_s, settings.max_pixels, settings.png_metadata),
            self._queue,
            self._estimator,
            self._worker,
            self.metrics,
            RateLimit(settings.rate_limit_per_minute),
        )
        self.metrics.watch(self)
        self.metrics.watch_card(gpu.read, lambda: self.service.held_memory)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, None while there is none."""
        return self._worker.pid

    async def start(self) -> None:
        """Start the worker and everything that serves it, once; return before the model is
        loaded.
        """
        if self._tasks:
            return
        _log.info("Model %s: %s.", self.model.id, self.choice.reason)
        self._worker.start()
        self.decoders.start()
        self._tasks = [
            asyncio.create_task(self._dispatcher.run(), name="dispatcher"),
            asyncio.create_task(self._lag.run(), name="loop lag"),
        ]

    def drain(self) -> float:
        """Take nothing new; return the seconds until the last accepted job's deadline."""
        return self.service.drain()

    async def wait_until_drained(self, budget_s: float) -> None:
        """Return once everything accepted has ended, or after *budget_s*."""
        while True:
            try:
                async with asyncio.timeout(budget_s):
                    await self.service.wait_until_idle()
                return
            except TimeoutError:
                # What had places only may have become jobs with a later deadline meanwhile.
                budget_s = self.drain()
            if budget_s == 0:
                break
        _log.error("Jobs were still running when the drain's time was over.")

    async def close(self) -> None:
        """Stop in reverse order; what still waits is failed by name."""
        self._queue.fail_waiting(DeadlineExceeded("The service was stopped before the job ran."))
        for task in self._tasks:
            task.cancel()
        self.decoders.kill()
        await self._worker.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.service.close()

    def kill(self) -> None:
        """End the worker and the decoders now, with what runs in them; `close` is still wanted."""
        self._worker.kill()
        self.decoders.kill()

    # What the supervisor tells.

    def on_worker_ready(self, info: ModelInfo, seconds: float) -> None:
        """Learn the speed of the warm-up image and say what is served."""
        self._estimator.learn(warm_up_spec(self.model), info.warm_up_s)
        self.metrics.model_ready(info, seconds)
        for callback in self.on_ready:
            callback(info)

    def on_worker_lost(self, reason: str) -> None:
        """Count it."""
        self.metrics.worker_lost(reason)

    def on_fatal(self, exit_code: int, message: str) -> None:
        """Answer who waits, and let whoever runs the service end it."""
        self.service.drain()
        self._queue.fail_waiting(
            Unavailable(
                "The service is ending before the job could run; try again in a while.",
                kind=Kind.WORKER_DOWN,
                retry_after_s=30,
            )
        )
        if not self.ended.done():
            self.ended.set_result(Ended(exit_code, message))

    # What a scrape reads.

    @property
    def queue_size(self) -> int:
        """Images that wait."""
        return self._queue.size

    @property
    def queue_capacity(self) -> int:
        """Images that may wait."""
        return self._queue.capacity

    @property
    def running(self) -> int:
        """Images on the card or on their way from it."""
        return self._queue.running

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        return self.service.status().is_ready

    @property
    def is_worker_up(self) -> bool:
        """Whether a worker process is there."""
        return self._worker.pid is not None

    @property
    def estimated_wait_s(self) -> float:
        """How long a new image would wait, in seconds."""
        return self._queue.expected_wait_s()

    @property
    def loop_lag_s(self) -> float:
        """How late the event loop woke, the most in the last minute, in seconds."""
        return self._lag.read()


def build_runtime(
    settings: Settings, *, make_engine: EngineFactory = create_engine, gpu: Card | None = None
) -> Runtime:
    """Build the service for *settings*; call it inside a running event loop.

    Raises:
        StartupError: model or card cannot be used; one sentence and what to do.
    """
    index = settings.device if isinstance(settings.device, int) else 0
    return Runtime(settings, make_engine, gpu or Card(index))


def _engine_config(settings: Settings, choice: Choice, device: int | None) -> EngineConfig:
    return EngineConfig(
        model=choice.key,
        path=choice.path,
        cache_dir=str(settings.cache_dir),
        device=device,
        precision=settings.precision,
        offload=settings.offload,
        plan=settings.plan,
        download_silence_s=settings.download_silence_s,
        prompt_cache=settings.prompt_cache,
        max_pixels=settings.max_pixels,
    )
