"""Keeps one worker alive, and fails the jobs of a dead one. Implements `domain.Backend`.

This module has the policy, `app.worker.process` the process. A worker that dies, at any time and
for any reason, or cannot be started is restarted with back-off, until the service gives up. A
worker that reports why it cannot load the model at the first start ends the service, since another
try would only hide the reason. A job whose worker died fails and is never run again: it may be the
cause. Ready and alive differ: `progress` tells them apart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from app.domain import Generated, ImageSpec, LoadProgress, Loss, ModelInfo, Progress, WorkerStage
from app.engine.config import EngineConfig
from app.errors import Kind, KleinError, Unavailable, WorkerLost
from app.request_context import current_request
from app.worker import child, restarts
from app.worker.fork_server import ForkServer
from app.worker.messages import (
    Cancel,
    Done,
    Failed,
    FromWorker,
    Generate,
    Ping,
    Pong,
    StartFailed,
    Stepped,
    Stop,
)
from app.worker.process import Launched, WorkerProcess, launch

_log = logging.getLogger(__name__)

_OVER = "The service is ending because its worker cannot be kept alive; try again in a while."
_CLOSING = "The service is shutting down; try again in a while."
_OVER_RETRY_S = 30
_FAILED = "The service could not be started or kept alive and is ending; the log says why."

_IN_WORDS = {
    WorkerStage.STARTING: "The worker is starting",
    WorkerStage.DOWNLOAD: "The model is being downloaded",
    WorkerStage.VERIFY: "The model's files are being verified",
    WorkerStage.LOADING: "The model is being loaded",
    WorkerStage.WEIGHTS: "The weights are being read",
    WorkerStage.WARM_UP: "The model is warming up",
    WorkerStage.RESTARTING: "The worker is being restarted",
}

_FETCHING = frozenset({WorkerStage.DOWNLOAD, WorkerStage.VERIFY})
"""Stages of a start whose length depends on the network and the disk."""
_SLOW = (
    "Loading, compiling and warming up took longer than {:g} s; see the log above, and raise "
    "KLEIN_LOAD_LIMIT_S if this machine is only slow."
)
_SILENT = (
    "The worker said nothing of its download for {:g} s and was ended; what has come is kept, "
    "start again to go on from there."
)

_NOT_WOKEN = (
    "The worker sleeps and could not be woken, most likely since another program uses the card; "
    "the service's log says why, and it is tried again."
)

_WITHOUT_FILES = (
    "The worker sleeps and could not be woken, since files of its model are missing or were "
    "changed; the service's log says which, and it is tried again."
)

EXIT_START_FAILED = 1
EXIT_CRASH_LOOP = 70
"""EX_SOFTWARE of sysexits.h; whatever started the service may restart it."""


class Events(Protocol):
    """Receives the worker's events, in the event loop's thread."""

    def on_worker_ready(self, info: ModelInfo, seconds: float) -> None:
        """Handle a loaded model, *seconds* after the start of its process."""

    def on_worker_lost(self, reason: Loss) -> None:
        """Handle a lost worker."""

    def on_asleep(self) -> None:
        """Handle the end of a process that was told to sleep."""

    def on_wake_failed(self, why: str) -> None:
        """Handle a wake that did not become ready; *why* is for any client. It sleeps on."""

    def on_fatal(self, exit_code: int, message: str) -> None:
        """Handle the end of the service."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long a worker may be silent, or take to exit, in seconds."""

    load_s: float = 1800.0
    """From the start to ready, or from the end of a download to ready."""
    download_s: float = 180.0
    """Between two progress messages of a download, for which `load_s` does not count."""
    silence_s: float = 60.0
    silence_steps: float = 20.0
    """A running job may be silent for this many of its predicted steps, if that is longer."""
    beat_s: float = 5.0
    """Between two pings of an idle worker."""
    silence_idle_s: float = 30.0
    """How long an idle worker may leave pings unanswered."""
    close_s: float = 5.0
    """How long it may take to exit: after `Stop`, and by itself after its last message."""


@dataclass(eq=False, slots=True)
class _Running:
    """A job in the worker, from `run` to the answer or the worker's end."""

    answer: asyncio.Future[Generated]
    on_progress: Callable[[Progress], None]
    silence_s: float
    step_started: float
    watch: asyncio.TimerHandle | None = None


class Supervisor:
    """Owns the worker process. Used in the event loop's thread only; its `repr` is its state."""

    def __init__(
        self,
        make_engine: child.EngineFactory,
        config: EngineConfig,
        events: Events,
        *,
        predict_step_s: Callable[[ImageSpec], float] = lambda spec: 0.0,
        limits: TimeLimits | None = None,
        log: tuple[str, str] = ("text", "info"),
        clock: Callable[[], float] = time.monotonic,
        fork_server: ForkServer | None = None,
    ) -> None:
        self._events = events
        self._predict_step_s = predict_step_s
        self._limits = limits or TimeLimits()
        self._make_engine = make_engine
        self.config = config
        """Of the next process; it may be replaced."""
        self._log = log
        self._clock = clock
        self._fork_server = fork_server or ForkServer()
        self._starts = 0
        self._handle: WorkerProcess | None = None
        self._running: dict[str, _Running] = {}
        self._deaths: list[float] = []
        self._failed_starts = 0
        self._lost_because: Loss | None = None
        self._next: asyncio.TimerHandle | None = None
        """Its next start, or the limit of its start, or its next beat, whatever it is at."""
        self._leave_watch: asyncio.TimerHandle | None = None
        self._overdue = ""
        self._unanswered = 0
        self._started_at = 0.0
        self._is_ready = asyncio.Event()
        self._is_closing = False
        self._is_sleeping = False
        self._is_waking = False
        self._not_woken = _NOT_WOKEN
        """What clients are told of a wake that fails."""
        self.progress = LoadProgress(WorkerStage.STARTING)
        self.info: ModelInfo | None = None
        self.restart_count = 0

    def __repr__(self) -> str:
        return f"<Supervisor {self.progress.stage}, {len(self._running)} running, {self._handle}>"

    @property
    def is_ready(self) -> bool:
        """Whether a job could start."""
        return self._is_ready.is_set()

    @property
    def reason(self) -> str:
        """Why no job could start now, in words that any client may read; empty where one could."""
        if self.progress.stage == WorkerStage.FAILED:
            # The operator's message (`Events.on_fatal`) may name paths.
            return _FAILED
        return "" if self.is_ready else _in_words(self.progress)

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while there is none."""
        return self._handle.pid if self._handle else None

    def start(self) -> None:
        """Start a worker; if it cannot be started, try again later or give up."""
        # A listener may have killed it in the moment that a restart was planned.
        if self._is_closing or self.progress.stage == WorkerStage.FAILED:
            return
        self._started_at = self._clock()
        self._overdue, self._lost_because = "", None
        self._not_woken = _NOT_WOKEN
        self._watch_start()
        self._starts += 1
        launching = partial(launch, self._make_engine, self.config, self._log)
        try:
            self._fork_server.start(launching, partial(self._on_launched, self._starts))
        except Exception as error:
            self._on_unstartable(error)

    def _on_launched(self, start: int, launched: Launched | Exception) -> None:
        """Take over the process of the *start*-th start, unless that has been given up."""
        if self._is_closing or start != self._starts:
            if not isinstance(launched, Exception):
                launched.kill()
                launched.pipe.close()
                launched.close()
            return
        try:
            if isinstance(launched, Exception):
                raise launched
            self._handle = WorkerProcess(
                self.on_message, self.on_exit, launched, self._limits.close_s
            )
        except Exception as error:
            self._on_unstartable(error)

    def sleep(self) -> None:
        """End the process, on which nothing may run, and start none until `wake`.

        Without one there will be none.
        """
        self._is_ready.clear()
        self._stop_watching()
        self._is_sleeping, self._is_waking = True, False
        self.progress = LoadProgress(WorkerStage.ASLEEP)
        if self._handle:
            self._handle.send(Stop())
            self._await_leave()

    def wake(self) -> None:
        """Start a process again; `Events.on_wake_failed` where it does not become ready."""
        self._is_sleeping, self._is_waking = False, True
        self.progress = LoadProgress(WorkerStage.STARTING)
        self.start()

    async def wait_until_ready(self) -> None:
        """Return once a job could start."""
        while not self.is_ready:
            await self._is_ready.wait()

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        """Generate one image in the worker.

        Cancelling the call stops the job at its next denoising step and returns when the GPU is
        free.

        Raises:
            KleinError: as the worker reported it, or WorkerLost where it died.
        """
        # In a loop: a worker may have exited between its being ready and this task's wake-up.
        while not self.is_ready:
            if self.progress.stage == WorkerStage.FAILED:
                raise Unavailable(_OVER, kind=Kind.WORKER_DOWN, retry_after_s=_OVER_RETRY_S)
            if self._is_closing:
                raise Unavailable(_CLOSING, kind=Kind.DRAINING, retry_after_s=_OVER_RETRY_S)
            await self._is_ready.wait()
        handle = self._handle
        assert handle is not None
        running = _Running(
            answer=asyncio.get_running_loop().create_future(),
            on_progress=on_progress,
            silence_s=max(
                self._limits.silence_s, self._limits.silence_steps * self._predict_step_s(spec)
            ),
            step_started=self._clock(),
        )
        self._running[job_id] = running
        self._watch(running)
        context = current_request.get(None)
        handle.send(Generate(job_id, spec, context.id if context else ""))
        try:
            return await asyncio.shield(running.answer)
        except asyncio.CancelledError:
            if not running.answer.done():
                handle.send(Cancel(job_id))
                await asyncio.wait([running.answer])
            running.answer.exception()
            raise
        finally:
            del self._running[job_id]
            if running.watch:
                running.watch.cancel()

    async def close(self) -> None:
        """Stop the worker, then kill it after a while; kill it at once after its last message."""
        self._stop_watching()
        handle, self._is_closing = self._handle, True
        self._wake()
        if handle is None:
            return
        if self.progress.stage != WorkerStage.FAILED:
            handle.send(Stop())
            self._await_leave()
        else:
            handle.kill()
        await handle.wait()

    def kill(self) -> None:
        """Kill the worker's process now, and start no other."""
        self._stop_watching()
        self._is_closing = True
        if self._handle:
            self._handle.kill()

    def on_message(self, handle: WorkerProcess, message: FromWorker) -> None:
        """Handle the worker's message; drop those about a job that has ended."""
        if handle is not self._handle:
            return
        match message:
            case LoadProgress():
                self._on_loading(message)
            case ModelInfo():
                self._on_ready(message)
            case StartFailed(text, is_of_files):
                self._not_woken = _WITHOUT_FILES if is_of_files else _NOT_WOKEN
                self._on_start_failed(text)
            case Pong():
                self._unanswered = 0
            case Stepped(job_id, progress) if running := self._answerable(job_id):
                running.step_started = self._clock()
                _tell(running, progress)
            case Done(job_id, generated) if running := self._answerable(job_id):
                self._deaths.clear()
                running.answer.set_result(generated)
            case Failed(job_id) if running := self._answerable(job_id):
                self._on_failed(running, message.error())
            case _:
                _log.debug("Dropped what the worker said of a job that has ended.")

    def on_exit(self, handle: WorkerProcess | None, exit_code: int | None) -> None:
        """Fail the running job, and decide whether to restart; None was never started."""
        if handle is not self._handle:
            return
        self._is_ready.clear()
        self._handle = None
        self._stop_watching()
        self._fail_running()
        if self._is_closing:
            return
        if self._is_sleeping:
            self._events.on_asleep()
            return
        if self._is_waking:
            _log.error("The worker did not wake, exit code %s.", exit_code)
            self._sleep_on()
            return
        reason = self._lost_because or (
            Loss.KILLED if self.progress.stage == WorkerStage.READY else Loss.STARTUP
        )
        _log.error("The worker has gone (%s), exit code %s.", reason, exit_code)
        if self._overdue and self.info is None:
            self._give_up(EXIT_START_FAILED, self._overdue)
        else:
            self._plan_restart(reason)

    def _answerable(self, job_id: str) -> _Running | None:
        running = self._running.get(job_id)
        return running if running and not running.answer.done() else None

    def _on_failed(self, running: _Running, error: KleinError) -> None:
        if isinstance(error, WorkerLost):
            # Nothing may start on a lost GPU; the worker is exiting.
            self._is_ready.clear()
            self._lost_because = Loss.FATAL_CUDA
            self._await_leave()
        running.answer.set_exception(error)

    def _plan_restart(self, reason: Loss) -> None:
        self._events.on_worker_lost(reason)
        now = self._clock()
        self._deaths.append(now)
        if self.progress.stage != WorkerStage.READY:
            self._failed_starts += 1
        decision = restarts.decide(self._deaths, now, self._failed_starts)
        if decision.delay_s is None:
            self._give_up(
                EXIT_CRASH_LOOP,
                f"{decision.reason}; see the log above, then run `klein doctor`.",
            )
            return
        self.restart_count += 1
        self.progress = LoadProgress(WorkerStage.RESTARTING)
        _log.warning("A new worker starts in %.0f s: %s.", decision.delay_s, decision.reason)
        self._after(decision.delay_s, self.start)

    def _sleep_on(self) -> None:
        """Be asleep as before a wake that failed: it counts in no restart policy."""
        self._stop_watching()
        self._is_waking = False
        self._is_sleeping = True
        self.progress = LoadProgress(WorkerStage.ASLEEP, None, self._not_woken)
        self._events.on_wake_failed(self._not_woken)

    def _on_unstartable(self, error: Exception) -> None:
        """Try again, except at the first start where the error says what must be fixed first."""
        if self._is_waking:
            _log.error("The worker could not be started to wake: %r.", error)
            self._sleep_on()
            return
        if self.info is None and isinstance(error, KleinError):
            self._give_up(EXIT_START_FAILED, error.message)
            return
        # For a lack of resources the error's name suffices; for any other, log the traceback.
        trace = None if isinstance(error, OSError | MemoryError) else error
        _log.error("The worker could not be started: %r.", error, exc_info=trace)
        self._plan_restart(Loss.STARTUP)

    def _on_loading(self, progress: LoadProgress) -> None:
        """Restart the limit of silence: a download may take any time while it reports progress."""
        before, self.progress = self.progress.stage, progress
        if not _FETCHING.isdisjoint((before, progress.stage)):
            self._watch_start()

    def _watch_start(self) -> None:
        """Apply the time limit of the start's current stage from now on."""
        limit_s, sentence = self._limits.load_s, _SLOW
        if self.progress.stage in _FETCHING:
            limit_s, sentence = self._limits.download_s, _SILENT
        self._after(limit_s, self._end_start, sentence.format(limit_s))

    def _end_start(self, sentence: str) -> None:
        self._overdue = sentence
        _log.error("%s", sentence)
        self._end_worker(Loss.STARTUP)

    def _on_ready(self, info: ModelInfo) -> None:
        self._is_waking = False
        self.info, self._failed_starts = info, 0
        self.progress = LoadProgress(WorkerStage.READY, 1.0)
        self._is_ready.set()
        self._unanswered = 0
        self._beat()
        self._events.on_worker_ready(info, self._clock() - self._started_at)

    def _on_start_failed(self, text: str) -> None:
        self._lost_because = Loss.STARTUP
        self._await_leave()
        if self._is_waking:
            _log.error("The worker could not wake: %s", text)
        elif self.info is None:
            self._is_closing = True
            self._give_up(EXIT_START_FAILED, text)
        else:
            _log.error("The new worker could not load the model: %s", text)

    def _give_up(self, exit_code: int, message: str) -> None:
        if self._next:
            self._next.cancel()
        self.progress = LoadProgress(WorkerStage.FAILED, None, message)
        self._events.on_fatal(exit_code, message)
        self._wake()

    def _wake(self) -> None:
        """Wake the tasks that wait for a worker, since none will come."""
        self._is_ready.set()
        self._is_ready.clear()

    def _fail_running(self) -> None:
        for running in tuple(self._running.values()):
            if not running.answer.done():
                running.answer.set_exception(
                    WorkerLost(
                        "The worker process was lost while it made the picture; "
                        "the request was not repeated and may be sent again."
                    )
                )

    def _watch(self, running: _Running) -> None:
        """End the worker if *running* has been silent for too long; else check again later."""
        silent_s = self._clock() - running.step_started
        if silent_s >= running.silence_s:
            _log.error("The worker was silent for %.0f s within one step.", silent_s)
            self._end_worker(Loss.HANG)
            return
        running.watch = asyncio.get_running_loop().call_later(
            running.silence_s - silent_s, self._watch, running
        )

    def _beat(self) -> None:
        """Ping an idle worker; end it if too many pings went unanswered.

        Pings are counted, not seconds: while this process itself was stopped, none were sent. A
        running job has a time limit of its own.
        """
        if self._running:
            self._unanswered = 0
        elif (self._unanswered + 1) * self._limits.beat_s >= self._limits.silence_idle_s:
            _log.error("The idle worker said nothing for %.0f s.", self._limits.silence_idle_s)
            self._end_worker(Loss.HEARTBEAT)
            return
        elif self._handle:
            self._unanswered += 1
            self._handle.send(Ping())
        self._after(self._limits.beat_s, self._beat)

    def _await_leave(self) -> None:
        """Wait a while for the worker to exit by itself."""
        if self._handle:
            self._leave_watch = asyncio.get_running_loop().call_later(
                self._limits.close_s, self._handle.kill
            )

    def _after(self, delay_s: float, act: Callable[..., None], *arguments: str) -> None:
        """Call *act* after *delay_s*, in place of what was to come next."""
        if self._next:
            self._next.cancel()
        self._next = asyncio.get_running_loop().call_later(delay_s, act, *arguments)

    def _stop_watching(self) -> None:
        for timer in (self._next, self._leave_watch):
            if timer:
                timer.cancel()

    def _end_worker(self, reason: Loss) -> None:
        self._lost_because = reason
        self._is_ready.clear()
        if self._handle:
            self._handle.kill()
        else:
            # Its process was not started yet: the fork server hangs, in an import perhaps.
            self._starts += 1
            self._fork_server.kill()
            self.on_exit(None, None)


def _in_words(progress: LoadProgress) -> str:
    """Say what a worker that is not ready is at, in a sentence; some progress is one already."""
    if progress.detail.endswith("."):
        return progress.detail
    said = _IN_WORDS.get(progress.stage, f"The worker is {progress.stage}")
    return f"{said} ({progress.detail})." if progress.detail else f"{said}."


def _tell(running: _Running, progress: Progress) -> None:
    """Pass *progress* on; an error of the listener costs neither the job nor the worker."""
    try:
        running.on_progress(progress)
    except Exception:
        _log.exception("A job's progress could not be told.")
