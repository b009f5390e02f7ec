"""The composition root: build the service from settings; start it in order, close it in reverse.

Only this module builds these objects, and it makes no decisions for them. Tests pass another
*make_engine*; no setting selects one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import psutil

from app import __version__
from app.domain import Device, Loss, ModelInfo
from app.engine import create_engine, imports
from app.engine.config import EngineConfig
from app.engine.models.flux2_klein import TOKENIZER
from app.engine.models.registry import find_model, find_spec
from app.engine.quantization.formats import AUTO
from app.errors import DeadlineExceeded, Kind, Unavailable
from app.images.pool import DecoderPool
from app.jobs.dispatcher import Dispatcher
from app.jobs.estimate import Estimates
from app.jobs.queue import JobQueue
from app.jobs.rate_limit import RateLimit
from app.jobs.taker import Taker
from app.limits import Limits, room
from app.model_choice import (
    KLEIN,
    Choice,
    LoraChoice,
    choose_devices,
    choose_loras,
    choose_model,
    largest_card,
)
from app.service.adapters import Adapters, AdapterWatch
from app.service.previews import Previews
from app.service.prompt_tokens import PromptTokens
from app.service.service import ImageService, warm_up_spec
from app.settings import PER_CARD, Settings
from app.telemetry.cards import Cards
from app.telemetry.gpu import Gpu, GpuFacts
from app.telemetry.lag import LoopLag
from app.telemetry.metrics import Metrics
from app.worker.card_claim import CardClaim
from app.worker.child import EngineFactory
from app.worker.common_choice import CommonChoice
from app.worker.fork_server import ForkServer
from app.worker.idle import IdleSleep
from app.worker.pool import Pool, Worker
from app.worker.rest import Cause
from app.worker.supervisor import Events, Supervisor, TimeLimits
from app.worker.transport import check_room
from app.worker.warm_record import WarmRecord
from app.worker.yielding import Yielding

_log = logging.getLogger(__name__)

DOWNLOAD_GRACE_S = 60.0
"""Seconds beyond `KLEIN_DOWNLOAD_SILENCE_S` for which a downloading worker may be silent.

Unless it hangs, it gives up by itself and reports why.
"""


_LOAD_BYTES = 4_500_000_000
"""Host memory of a worker that loads klein: 4.1 GB, measured on H100s and H200s, and some more."""
_NO_ROOM = "No card that serves has room for this picture; ask for a smaller size."


@dataclass(frozen=True, slots=True)
class Ended:
    """Why the service ends: the process's exit code and one sentence."""

    exit_code: int
    message: str


class Runtime:
    """One service from start to close. `ended` is set when it cannot continue."""

    def __init__(self, settings: Settings, make_engine: EngineFactory, cards: Cards) -> None:
        self.choice = choose_model(settings, largest_card(settings, cards))
        self.model = find_spec(self.choice.key)
        self.metrics = Metrics(version=__version__)
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.on_ready: list[Callable[[ModelInfo], None]] = []
        self._lag = LoopLag()
        self._estimates = Estimates(warm_up_spec(self.model))
        chosen = choose_loras(settings, self.choice)
        adapters = Adapters(settings.loras, settings.lora_rank, chosen.fused)
        self._watch = AdapterWatch(chosen.directory, adapters, [name for name, _ in settings.loras])
        self._settings, self._loras, self._make_engine = settings, chosen, make_engine
        devices = choose_devices(settings, self.choice, cards)
        self._devices = devices
        check_room(len(devices))
        # Of an engine that does not say so, nothing is known.
        known = imports if make_engine is create_engine else getattr(make_engine, "imports", None)
        self._fork_server = ForkServer(known(devices[0].torch_index) if known else ())
        is_common = len(devices) > 1 and settings.precision != PER_CARD
        first = _oldest(devices, cards) if is_common and _leaves_choice(settings) else None
        at_once = None if find_model(self.choice.key).is_embedded else _loads_at_once()
        self.workers = Pool(
            self._make_supervisor, devices, self, first=first, at_once=at_once, work=self
        )
        self._common = CommonChoice(self.workers) if is_common else None
        takers = {worker: self._make_taker(worker) for worker in self.workers.workers}
        self._takers = takers
        self._queue = JobQueue(settings.queue_images, tuple(takers.values()))
        self._queue.on_change = self.workers.look
        self._dispatchers = [
            Dispatcher(
                self._queue, worker.supervisor, self._estimates.of(worker.device.uuid), taker
            )
            for worker, taker in takers.items()
        ]
        self.tokens = PromptTokens(_tokenizer(self.choice), self.model.max_sequence_length)
        self.decoders = DecoderPool()
        self.previews = Previews(self.decoders)
        self.service = ImageService(
            self.model,
            _limits(settings, self.choice),
            self._queue,
            self._estimates,
            self.workers,
            self.metrics,
            RateLimit(settings.rate_limit_per_minute),
            deadline_s=settings.deadline_s,
            has_metadata=settings.png_metadata,
            adapters=adapters,
        )
        self.metrics.watch(self.service.status, self._lag.read)
        self._idle = IdleSleep(settings.idle_sleep_s, self._is_needed, self.workers.sleep)
        self._yielding = self._watch_devices(cards)
        self._tasks: list[asyncio.Task[None]] = []
        self._started = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the worker and all tasks, once; return before the model is loaded.

        Where one of them cannot be started, those before it are closed again.
        """
        if self._tasks:
            return
        _log.info("Model %s: %s.", self.model.id, self.choice.reason)
        async with AsyncExitStack() as started:
            started.callback(self.service.close)
            started.callback(self.tokens.close)
            # Last but one: a job that was cancelled may wait for the worker's end.
            started.push_async_callback(self._join)
            started.callback(self._fork_server.kill)
            started.push_async_callback(self.workers.close)
            for each in self._yielding:
                started.callback(each.close)
                each.begin()
            self.workers.start()
            started.callback(self.decoders.kill)
            self.decoders.start()
            started.callback(self._watch.close)
            self._watch.start()
            self._tasks = [
                *(
                    asyncio.create_task(each.run(), name=f"dispatcher {index}")
                    for index, each in enumerate(self._dispatchers)
                ),
                asyncio.create_task(self._lag.run(), name="loop lag"),
                *(asyncio.create_task(each.run(), name="yielding") for each in self._yielding),
            ]
            if self._settings.idle_sleep_s:
                self._tasks.append(asyncio.create_task(self._idle.run(), name="idle sleep"))
            for task in self._tasks:
                started.callback(task.cancel)
            self._started = started.pop_all()

    async def wait_until_drained(self, budget_s: float) -> None:
        """Return once everything accepted has ended, or after *budget_s*."""
        while True:
            try:
                async with asyncio.timeout(budget_s):
                    await self._queue.wait_until_empty()
                return
            except TimeoutError:
                # Reserved places may have become jobs with a later deadline meanwhile.
                budget_s = self.service.drain()
            if budget_s == 0:
                break
        _log.error("Jobs were still running when the drain's time was over.")

    async def close(self) -> None:
        """Close in reverse what was started, once; jobs that still wait fail with an error."""
        self._queue.fail_waiting(DeadlineExceeded("The service was stopped before the job ran."))
        await self._started.aclose()

    async def _join(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """Kill the worker and the decoders now, with their jobs; `close` must still be called."""
        self.workers.kill()
        self._fork_server.kill()
        self.decoders.kill()

    def _make_supervisor(self, device: Device, events: Events) -> Supervisor:
        settings = self._settings
        return Supervisor(
            self._make_engine,
            replace(
                _engine_config(settings, self.choice, device, self._loras),
                worker=self._devices.index(device),
            ),
            events,
            predict_step_s=self._estimates.of(device.uuid).predict_step,
            limits=TimeLimits(
                load_s=settings.load_limit_s,
                download_s=settings.download_silence_s + DOWNLOAD_GRACE_S,
                silence_s=settings.watchdog_s,
            ),
            log=(settings.log_format, settings.log_level),
            fork_server=self._fork_server,
        )

    def _watch_devices(self, cards: Cards) -> list[Yielding]:
        """Have the metrics show each device; return who leaves cards to others, if anyone."""
        yielding = []
        for worker in self.workers.workers:
            device = worker.device
            self.metrics.add_device(device)
            if device.index is None:
                continue
            gpu = cards.open(device)
            self.metrics.watch_gpu(gpu.read, partial(self.service.held_memory.get, device.uuid))
            if self._settings.yields == "auto":
                yielding.append(self._make_yielding(worker, gpu))
        return yielding

    def _make_yielding(self, worker: Worker, gpu: Gpu) -> Yielding:
        uuid, settings = worker.device.uuid, self._settings
        held = self.service.held_memory

        def reserved() -> int:
            return held[uuid].reserved if uuid in held else 0

        model = (self.choice.key, self.choice.path or "", settings.precision, settings.plan)
        return Yielding(
            self.workers,
            worker,
            gpu.read,
            holders=gpu.named_holders,
            reserved=reserved,
            is_busy=lambda: self.is_busy(worker.device),
            record=WarmRecord(settings.cache_dir, (*model, uuid, __version__)),
            claim=CardClaim(uuid),
        )

    # What the pool asks of the queue.

    def is_waiting(self) -> bool:
        """Whether a job waits."""
        return self._queue.waiting > 0

    def is_busy(self, device: Device) -> bool:
        """Whether a job is on *device*, or any waits or is being read."""
        on_it = (each.running for each in self._queue.takers if each.device == device)
        return self._queue.size > 0 or any(on_it)

    def _is_needed(self) -> bool:
        """Whether a job waits or runs, or no worker is ready, which is no time that passes idly."""
        return self._queue.size > 0 or self._queue.running > 0 or not self.workers.is_ready

    def _make_taker(self, worker: Worker) -> Taker:
        uuid = worker.device.uuid
        supervisor = worker.supervisor

        def sizes() -> tuple[int, ...]:
            return supervisor.info.max_pixels if supervisor.info else ()

        return Taker(
            device=worker.device,
            is_ready=lambda: supervisor.is_ready,
            fits=lambda spec: spec.pixels <= room(sizes(), len(spec.references)),
            predict_s=self._estimates.of(uuid).predict,
            starts_in_s=lambda: worker.starts_in_s(time.monotonic()),
            speed=lambda: self._estimates.speed(uuid),
            room=sizes,
        )

    # The workers' events.

    def on_worker_ready(self, worker: Worker, info: ModelInfo, seconds: float) -> None:
        """Learn the speed of the warm-up image and log what is served and what is missing."""
        for sentence in info.advice:
            _log.warning(sentence)
        if self._common and not self._common.admits(worker, info):
            return
        self._estimates.of(worker.device.uuid).learn(warm_up_spec(self.model), info.warm_up_s)
        self.metrics.model_ready(info, seconds, worker.device)
        self._watch.on_ready(info)
        is_known = all(each.supervisor.info for each in self.workers.serving)
        self._queue.look_again(Unavailable(_NO_ROOM, kind=Kind.WORKER_DOWN) if is_known else None)
        for callback in self.on_ready:
            callback(info)

    def on_worker_lost(self, worker: Worker, reason: Loss) -> None:
        """Count the lost worker."""
        self.metrics.worker_lost(worker.device, reason)
        self._queue.look_again()

    def on_asleep(self, worker: Worker) -> None:
        """Forget what PyTorch held, which nothing holds now."""
        self.service.held_memory.pop(worker.device.uuid, None)

    def on_woken(self, worker: Worker, cause: Cause, seconds: float) -> None:
        """Count the wake."""
        self.metrics.worker_woken(worker.device, cause, seconds)

    def on_left_out(self, worker: Worker) -> None:
        """Give its jobs to the others, and fail those that fit no other."""
        self._queue.drop(self._takers[worker], Unavailable(_NO_ROOM, kind=Kind.WORKER_DOWN))

    def on_fatal(self, exit_code: int, message: str) -> None:
        """Fail the waiting jobs, and set `ended`."""
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


def build_runtime(
    settings: Settings, *, make_engine: EngineFactory = create_engine, cards: Cards | None = None
) -> Runtime:
    """Build the service for *settings*; call it inside a running event loop.

    Raises:
        StartupError: model or GPU cannot be used; one sentence and what to do.
    """
    return Runtime(settings, make_engine, cards or Cards())


def _leaves_choice(settings: Settings) -> bool:
    """Whether a card chooses its precision or its attention itself."""
    return AUTO in (settings.precision, settings.attention)


def _loads_at_once() -> int:
    """Return how many workers may load klein together in the host memory that is free now."""
    return max(1, psutil.virtual_memory().available // _LOAD_BYTES)


def _oldest(devices: Sequence[Device], cards: Cards) -> Device | None:
    """Return the device with the lowest compute capability; None where all are of one kind.

    One name may stand for several amounts of memory.
    """
    if len({(each.name, each.total_bytes) for each in devices}) == 1:
        return None

    def capability(device: Device) -> tuple[int, int]:
        facts = cards.open(device).facts()
        return facts.capability if isinstance(facts, GpuFacts) else (0, 0)

    return min(devices, key=capability)


def _tokenizer(choice: Choice) -> Path:
    """Return the folder of the model's tokenizer: its own, else the one that comes with us."""
    folder = Path(choice.path) if choice.path else find_model(choice.key).folder
    own = folder / "tokenizer" if folder else TOKENIZER
    return own if (own / "tokenizer_config.json").is_file() else TOKENIZER


def _limits(settings: Settings, choice: Choice) -> Limits:
    """Combine the model's limits with the operator's; the demo may be asked for klein's sizes."""
    scaled = None
    if settings.demo_scale and choice.is_demo:
        scaled = Limits.of(find_spec(KLEIN), settings.max_pixels)
    model = find_spec(choice.key)
    return Limits.of(
        model, settings.max_pixels, settings.max_references, scaled, settings.lora_rank
    )


def _engine_config(
    settings: Settings, choice: Choice, device: Device, loras: LoraChoice
) -> EngineConfig:
    return EngineConfig(
        model=choice.key,
        path=choice.path,
        cache_dir=str(settings.cache_dir),
        device=device.torch_index,
        place=device,
        vae=None if settings.vae is None else str(settings.vae),
        precision=settings.engine_precision,
        attention=settings.attention,
        offload=settings.offload,
        plan=settings.plan,
        download_silence_s=settings.download_silence_s,
        prompt_cache=settings.prompt_cache,
        reference_cache=settings.reference_cache,
        cache_max_bytes=int(settings.cache_max_gb * 1e9),
        max_pixels=settings.max_pixels,
        lora_rank=loras.planned_rank,
        lora_fuse=loras.fused,
    )
