"""Several workers, one for each device, behind one face: it is ready while one of them is.

A worker that dies is replaced alone, by its own supervisor. One that its supervisor gives up is
left out while others go on; the service ends when none is left. A worker that sleeps (`rest`) wakes
when a job waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from app.domain import Device, LoadProgress, Loss, ModelInfo, WorkerStage, WorkerStatus
from app.worker.rest import Cause, Do, Rest, RestState
from app.worker.supervisor import Events, Supervisor

_log = logging.getLogger(__name__)

_FURTHEST = (
    WorkerStage.READY,
    WorkerStage.WARM_UP,
    WorkerStage.WEIGHTS,
    WorkerStage.LOADING,
    WorkerStage.VERIFY,
    WorkerStage.DOWNLOAD,
    WorkerStage.STARTING,
    WorkerStage.RESTARTING,
    WorkerStage.ASLEEP,
    WorkerStage.FAILED,
)
"""The stages of a worker; the pool's is the first that one of them is at."""
_AT_REST = frozenset({WorkerStage.READY, WorkerStage.ASLEEP, WorkerStage.FAILED})
"""Stages of a worker that is not loading."""
_HELD = (
    "The card is left to another program, which uses its memory; the service takes it back a "
    "minute after that is free, or at once by POST /wake."
)
_RETRY_S = (15.0, 30.0, 60.0, 120.0)
"""After so many wakes in a row that failed; each try takes the card, or the disk, from others."""


class PoolEvents(Protocol):
    """Receives what happens to the workers, in the event loop's thread."""

    def on_worker_ready(self, worker: Worker, info: ModelInfo, seconds: float) -> None:
        """Handle a loaded model, *seconds* after the start of its process."""

    def on_worker_lost(self, worker: Worker, reason: Loss) -> None:
        """Handle a lost worker, which is replaced unless one of the next two follows."""

    def on_asleep(self, worker: Worker) -> None:
        """Handle a worker whose process has ended so that it sleeps."""

    def on_woken(self, worker: Worker, cause: Cause, seconds: float) -> None:
        """Handle a worker that is ready again, *seconds* after its start."""

    def on_left_out(self, worker: Worker) -> None:
        """Handle the end of a worker for good, while others go on."""

    def on_fatal(self, exit_code: int, message: str) -> None:
        """Handle the end of the last one: the service ends."""


class Work(Protocol):
    """What the pool asks of the queue."""

    def is_waiting(self) -> bool:
        """Whether a job waits."""

    def is_busy(self, device: Device) -> bool:
        """Whether a job is on *device*, or any waits or is being read."""


class _Nothing:
    def is_waiting(self) -> bool:
        return False

    def is_busy(self, device: Device) -> bool:
        return False


class Worker:
    """One supervisor and its device; handles its events."""

    def __init__(
        self, pool: Pool, device: Device, make: Callable[[Device, Events], Supervisor]
    ) -> None:
        self._pool = pool
        self.device = device
        self.is_left_out = False
        self.rest = Rest()
        self.wake_s = 0.0
        """Seconds of its last start."""
        self.wake_began = 0.0
        self.failed_wakes = 0
        """In a row."""
        self.next_try: asyncio.TimerHandle | None = None
        self.supervisor = make(device, self)

    def __repr__(self) -> str:
        state = "left out" if self.is_left_out else repr(self.supervisor)
        return f"<Worker {self.device.uuid}, {state}>"

    @property
    def status(self) -> WorkerStatus:
        """The worker's state."""
        supervisor = self.supervisor
        return WorkerStatus(
            device=self.device,
            stage=supervisor.progress.stage,
            is_ready=supervisor.is_ready,
            is_up=supervisor.pid is not None,
            progress=supervisor.progress.fraction,
            reason=supervisor.reason,
            restarts=supervisor.restart_count,
            info=supervisor.info,
            is_left_out=self.is_left_out,
            is_yielding=self.rest.state is RestState.ASLEEP and self.rest.is_held,
        )

    @property
    def is_unavailable(self) -> bool:
        """Whether it sleeps and no request wakes it: its card is held, or its last wake failed."""
        return self.rest.state is RestState.ASLEEP and bool(self.rest.is_held or self.rest.failure)

    @property
    def is_awaited(self) -> bool:
        """Whether it sleeps or wakes, so that a job that waits will start."""
        return self.rest.state is not RestState.AWAKE and not self.is_unavailable

    def starts_in_s(self, now: float) -> float:
        """Return the predicted seconds until a job could start on it, as far as it sleeps."""
        if self.rest.state is RestState.AWAKE:
            return 0.0
        waking_s = now - self.wake_began if self.rest.state is RestState.WAKING else 0.0
        # One that takes longer than the last is expected to take as long again as it is late.
        return abs(self.wake_s - waking_s)

    def on_worker_ready(self, info: ModelInfo, seconds: float) -> None:
        """Pass it on, and start those that wait for it."""
        cause = self.rest.ready()
        self.failed_wakes = 0
        self.wake_s = seconds if cause else info.load_s
        self._pool.events.on_worker_ready(self, info, seconds)
        if cause:
            self._pool.events.on_woken(self, cause, seconds)
        self._pool.on_ready()
        self._pool.look()

    def on_asleep(self) -> None:
        """Pass it on, and see whether it is wanted again already."""
        self.rest.gone()
        self._pool.events.on_asleep(self)
        self._pool.look()

    def on_wake_failed(self, why: str) -> None:
        """Have it tried again later."""
        self.rest.failed(why)
        self.failed_wakes += 1
        self._pool.retry(self)

    def on_worker_lost(self, reason: Loss) -> None:
        """Pass it on."""
        self._pool.events.on_worker_lost(self, reason)

    def on_fatal(self, exit_code: int, message: str) -> None:
        """Leave this worker out; the last one ends the service."""
        self.is_left_out = True
        self._pool.on_left_out(self, exit_code, message)


class Pool:
    """Owns a supervisor for each of *devices*, which *make* makes.

    *at_once* workers load at a time where the host's memory holds no more loads; with *first* the
    others start once that one has loaded. Used in the event loop's thread only; its `repr` is its
    state.
    """

    def __init__(
        self,
        make: Callable[[Device, Events], Supervisor],
        devices: Sequence[Device],
        events: PoolEvents,
        *,
        at_once: int | None = None,
        first: Device | None = None,
        work: Work | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events = events
        self._work = work or _Nothing()
        self._clock = clock
        self.workers = tuple(Worker(self, device, make) for device in devices)
        self._at_once = at_once or len(self.workers)
        self._is_alone = first is not None
        self._order = sorted(self.workers, key=lambda each: each.device != first)
        self._unstarted: list[Worker] = []
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Pool {list(self.workers)}>"

    @property
    def serving(self) -> tuple[Worker, ...]:
        """Those that are not left out."""
        return tuple(each for each in self.workers if not each.is_left_out)

    @property
    def is_ready(self) -> bool:
        """Whether a job could start on one of them."""
        return any(each.supervisor.is_ready for each in self.workers)

    @property
    def is_awaited(self) -> bool:
        """Whether none is ready, but one sleeps or wakes, so that a job that waits will start."""
        return not self.is_ready and any(each.is_awaited for each in self.serving)

    @property
    def state(self) -> str:
        """In one word: ready, waking, asleep or yielding; empty for what no sleep explains."""
        if self.is_ready:
            return "ready"
        awaited = [each.rest for each in self.serving if each.is_awaited]
        if awaited:
            return "waking" if any(each.is_waking for each in awaited) else "asleep"
        return "yielding" if any(each.is_unavailable for each in self.serving) else ""

    @property
    def progress(self) -> LoadProgress:
        """The progress of the worker that is furthest; of workers that all failed, the last's."""
        found = [each.supervisor.progress for each in self.serving or self.workers[-1:]]
        return min(
            found,
            key=lambda progress: (_FURTHEST.index(progress.stage), -(progress.fraction or 0.0)),
        )

    @property
    def reason(self) -> str:
        """Why no job could start now, in words that any client may read; empty where one could."""
        if self.is_ready or self.is_awaited:
            return ""
        yielding = [each.rest for each in self.serving if each.is_unavailable]
        if yielding:
            return _HELD if yielding[0].is_held else yielding[0].failure
        furthest = self.progress
        return next(
            each.supervisor.reason
            for each in self.serving or self.workers[-1:]
            if each.supervisor.progress is furthest
        )

    @property
    def info(self) -> ModelInfo | None:
        """What the first worker that serves has loaded, with the largest sizes of any of them."""
        found = [info for each in self.serving if (info := each.supervisor.info)]
        if not found:
            return None
        most = [sizes for info in found if (sizes := info.max_pixels)]
        return replace(found[0], max_pixels=tuple(map(max, zip(*most, strict=True))))

    @property
    def restart_count(self) -> int:
        """How many times a worker was started again."""
        return sum(each.supervisor.restart_count for each in self.workers)

    @property
    def pid(self) -> int | None:
        """The process id of the first worker that has one."""
        pids = (each.supervisor.pid for each in self.workers)
        return next((pid for pid in pids if pid is not None), None)

    @property
    def statuses(self) -> tuple[WorkerStatus, ...]:
        """The state of each worker."""
        return tuple(each.status for each in self.workers)

    def start(self) -> None:
        """Start the workers, as many at once as may load together."""
        self._unstarted = [each for each in self._order if each.rest.state is RestState.AWAKE]
        self._start_some(self._room())

    def on_ready(self) -> None:
        """Start the workers that waited for one to be ready."""
        self._is_alone = False
        self._start_some(self._room())

    def sleep(self, cause: Cause, *workers: Worker) -> None:
        """Have *workers*, else all, sleep once nothing runs or waits."""
        for each in workers or self.serving:
            each.rest.sleep(cause)
        self.look()

    def wake(self, cause: Cause = Cause.REQUEST, *workers: Worker) -> None:
        """Have *workers*, else all, wake if they sleep."""
        for each in workers or self.serving:
            each.rest.wake(cause)
        self.look()

    def hold(self, worker: Worker) -> None:
        """Have *worker* begin asleep, since another program has its card; before `start`."""
        worker.rest.hold()
        worker.supervisor.sleep()

    def look(self) -> None:
        """Do what is to be done now: whatever a worker waits for may have come."""
        if self._is_closed:
            return
        is_waiting = self._work.is_waiting()
        for each in self.serving:
            if is_waiting and not each.is_unavailable:
                each.rest.wake(Cause.REQUEST)
            act = each.rest.settle(
                is_ready=each.supervisor.is_ready,
                has_work=self._work.is_busy(each.device),
                has_room=self._room() > 0,
            )
            if act is Do.STOP:
                _log.info("%s (%s) falls asleep.", each.device.name, each.device.uuid)
                each.supervisor.sleep()
            elif act is Do.START:
                _log.info("%s (%s) wakes.", each.device.name, each.device.uuid)
                each.wake_began = self._clock()
                each.supervisor.wake()

    def load_again(self, worker: Worker) -> None:
        """Have *worker*, which has just become ready, end and start anew with its configuration."""
        worker.rest.begin_again()
        worker.supervisor.sleep()

    def retry(self, worker: Worker) -> None:
        """Try to wake *worker* again in a while."""

        def again() -> None:
            if worker.rest.failure and not worker.rest.is_held:
                self.wake(Cause.RETRY, worker)

        # One at a time: whoever asks for a wake meanwhile, and sees it fail, begins no second row.
        if worker.next_try:
            worker.next_try.cancel()
        delay_s = _RETRY_S[min(worker.failed_wakes, len(_RETRY_S)) - 1]
        worker.next_try = asyncio.get_running_loop().call_later(delay_s, again)

    def _room(self) -> int:
        """Return how many more may load now."""
        loading = (
            each.supervisor.progress.stage not in _AT_REST and each not in self._unstarted
            for each in self.serving
        )
        return max(0, (1 if self._is_alone else self._at_once) - sum(loading))

    def _start_some(self, count: int) -> None:
        """Start *count* workers of those that were not started yet."""
        for _ in range(count):
            if self._unstarted and not self._is_closed:
                self._unstarted.pop(0).supervisor.start()

    async def close(self) -> None:
        """Close all workers together."""
        self._is_closed = True
        await asyncio.gather(*(each.supervisor.close() for each in self.workers))

    def kill(self) -> None:
        """Kill all processes now, and start no other."""
        self._is_closed = True
        for each in self.workers:
            each.supervisor.kill()

    def on_left_out(self, worker: Worker, exit_code: int, message: str) -> None:
        """Go on without *worker*, or end the service where it was the last."""
        if not self.serving:
            self.events.on_fatal(exit_code, message)
            return
        _log.error(
            "%s (%s) is left out, the other cards go on: %s",
            worker.device.name,
            worker.device.uuid,
            message,
        )
        self.events.on_left_out(worker)
        self._start_some(self._room())
