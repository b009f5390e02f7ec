"""Keeps one worker alive, and fails what a dead one was doing. Implements `domain.Backend`.

The policy stands here, the process in `handle`. A worker that dies serving is replaced with
back-off; one that cannot start the first time ends the service, since trying again would only hide
the reason. A job whose worker died is failed and never run again: it may be what killed it. Ready
is not alive: `stage` says which it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from app.domain import Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.errors import Kind, Unavailable, WorkerLost, from_kind
from app.worker import child, restarts
from app.worker.handle import WorkerHandle
from app.worker.messages import (
    Cancel,
    Done,
    Failed,
    FromWorker,
    Generate,
    Loading,
    Ready,
    StartFailed,
    Stepped,
    Stop,
)

_log = logging.getLogger(__name__)

_OVER = "The service is ending because its worker cannot be kept alive; try again in a while."
_OVER_RETRY_S = 30

_FETCHING = frozenset({"download", "verify"})
"""Stages of a start whose length depends on the network and the disk."""
_SLOW = (
    "Loading, compiling and warming up took longer than {:g} s; see the log above, and raise "
    "KLEIN_LOAD_LIMIT_S if this machine is only slow."
)
_SILENT = (
    "The worker said nothing of its download for {:g} s and was ended; what has come is kept, "
    "start again to go on from there."
)

EXIT_START_FAILED = 1
EXIT_CRASH_LOOP = 70
"""sysexits.h: EX_SOFTWARE; whatever started the service may start it afresh."""


class Events(Protocol):
    """Who is told of the worker's fate, in the event loop's thread."""

    def on_worker_ready(self, info: ModelInfo, seconds: float) -> None:
        """The model answers, *seconds* after the start of its process."""

    def on_worker_lost(self, reason: str) -> None:
        """The worker has gone: `fatal_cuda`, `killed`, `hang` or `startup`."""

    def on_fatal(self, exit_code: int, message: str) -> None:
        """The service cannot go on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a worker may be silent, in seconds."""

    load_s: float = 1800.0
    """From the start to ready, or from the end of a download to ready."""
    download_s: float = 180.0
    """Between two signs of life of a download, for which `load_s` does not count."""
    silence_s: float = 60.0
    silence_steps: float = 20.0
    """A running job may be silent for this many of its predicted steps, if that is longer."""
    close_s: float = 5.0


@dataclass(eq=False, slots=True)
class _Running:
    """A job in the worker, from `run` to the answer or the worker's end."""

    answer: asyncio.Future[Generated]
    on_progress: Callable[[Progress], None]
    silence_s: float
    step_started: float
    watch: asyncio.TimerHandle | None = field(default=None)


class Supervisor:
    """Owns the worker process. Used in the event loop's thread only; its `repr` is its state."""

    def __init__(
        self,
        make_engine: child.EngineFactory,
        config: object,
        events: Events,
        *,
        predict_step_s: Callable[[ImageSpec], float] = lambda spec: 0.0,
        limits: Limits | None = None,
        log: tuple[str, str] = ("text", "info"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_engine = make_engine
        self._config = config
        self._events = events
        self._predict_step_s = predict_step_s
        self._limits = limits or Limits()
        self._log = log
        self._clock = clock
        self._handle: WorkerHandle | None = None
        self._running: dict[str, _Running] = {}
        self._deaths: list[float] = []
        self._lost_because: str | None = None
        self._load_watch: asyncio.TimerHandle | None = None
        self._started_at = 0.0
        self._is_fetching = False
        self._overdue = ""
        self._restart: asyncio.TimerHandle | None = None
        self._is_ready = asyncio.Event()
        self._is_closing = False
        self.stage = "starting"
        self.progress = LoadProgress("starting")
        self.info: ModelInfo | None = None
        self.restart_count = 0

    def __repr__(self) -> str:
        return f"<Supervisor {self.stage}, {len(self._running)} running, {self._handle}>"

    @property
    def is_ready(self) -> bool:
        """Whether a job could start."""
        return self._is_ready.is_set()

    @property
    def load_progress(self) -> float | None:
        """How far the model has come, 0..1, where that is known."""
        return self.progress.fraction

    @property
    def reason(self) -> str:
        """Why no job could start now, in words; empty where one could."""
        return "" if self.is_ready else self.progress.detail or f"The worker is {self.stage}."

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while there is none."""
        return self._handle.pid if self._handle else None

    def start(self) -> None:
        """Start the first worker."""
        self._start_worker("starting")

    async def wait_until_ready(self) -> None:
        """Return once a job could start."""
        while not self.is_ready:
            await self._is_ready.wait()

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        """Make one picture in the worker.

        Cancelling the call stops the job at its next step and returns when the card is free.

        Raises:
            KleinError: as the worker reported it, or WorkerLost where it died.
        """
        # Again and again: a worker may have gone between its being ready and our being woken.
        while not self.is_ready:
            if self.stage == "failed":
                raise Unavailable(_OVER, kind=Kind.WORKER_DOWN, retry_after_s=_OVER_RETRY_S)
            await self._is_ready.wait()
        handle = self._handle
        assert handle is not None
        now = self._clock()
        steps_s = self._limits.silence_steps * self._predict_step_s(spec)
        running = _Running(
            answer=asyncio.get_running_loop().create_future(),
            on_progress=on_progress,
            silence_s=max(self._limits.silence_s, steps_s),
            step_started=now,
        )
        self._running[job_id] = running
        self._watch(running)
        handle.send(Generate(job_id, spec))
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
        """End the worker: politely first, then surely."""
        self._is_closing = True
        self._is_ready.clear()
        for timer in (self._restart, self._load_watch):
            if timer:
                timer.cancel()
        if (handle := self._handle) is None:
            return
        handle.send(Stop())
        try:
            async with asyncio.timeout(self._limits.close_s):
                await handle.wait()
        except TimeoutError:
            handle.kill()
            await handle.wait()

    def kill(self) -> None:
        """End the worker's process now, and start no other."""
        self._is_closing = True
        if self._handle:
            self._handle.kill()

    def on_message(self, handle: WorkerHandle, message: FromWorker) -> None:
        """Take what the worker says; anything about a job that has ended is dropped."""
        match message:
            case Loading(progress):
                self._on_loading(progress)
            case Ready(info):
                self._on_ready(info)
            case StartFailed(text):
                self._on_start_failed(text)
            case Stepped(job_id, progress) if running := self._running.get(job_id):
                running.step_started = self._clock()
                running.on_progress(progress)
            case Done(job_id, generated) if running := self._running.get(job_id):
                self._deaths.clear()
                running.answer.set_result(generated)
            case Failed(job_id, kind, text) if running := self._running.get(job_id):
                error = from_kind(kind, text)
                if isinstance(error, WorkerLost):
                    # Nothing may start on a card that is lost; the worker is leaving.
                    self._is_ready.clear()
                    self._lost_because = "fatal_cuda"
                running.answer.set_exception(error)
            case _:
                _log.debug("Dropped what the worker said of a job that has ended.")

    def on_exit(self, handle: WorkerHandle, exit_code: int) -> None:
        """Fail what ran, and decide whether to start again."""
        was_ready = self.info is not None
        self._is_ready.clear()
        self._handle = None
        if self._load_watch:
            self._load_watch.cancel()
        self._fail_running()
        if self._is_closing:
            return
        reason = self._lost_because or ("killed" if self.stage == "ready" else "startup")
        _log.error("The worker has gone (%s), exit code %s.", reason, exit_code)
        self._lost_because = None
        if not was_ready:
            self._give_up(
                EXIT_START_FAILED,
                self._overdue
                or "The worker process ended while it was loading the model; the log above says "
                "why.",
            )
            return
        self._events.on_worker_lost(reason)
        self._plan_restart()

    def _plan_restart(self) -> None:
        now = self._clock()
        self._deaths.append(now)
        decision = restarts.decide(self._deaths, now)
        if decision.delay_s is None:
            self._give_up(
                EXIT_CRASH_LOOP,
                f"{decision.reason}; see the log above, then run `klein doctor`.",
            )
            return
        self.restart_count += 1
        self.stage = "restarting"
        self.progress = LoadProgress("restarting")
        _log.warning("A new worker starts in %.0f s: %s.", decision.delay_s, decision.reason)
        self._restart = asyncio.get_running_loop().call_later(
            decision.delay_s, self._start_worker, "restarting"
        )

    def _start_worker(self, stage: str) -> None:
        self.stage = stage
        self._started_at = self._clock()
        self._overdue = ""
        self._is_fetching = False
        self._handle = WorkerHandle(self, self._make_engine, self._config, self._log)
        self._watch_start()

    def _on_loading(self, progress: LoadProgress) -> None:
        """A download may take as long as it likes, while it says something; the rest may not."""
        was_fetching, self._is_fetching = self._is_fetching, progress.stage in _FETCHING
        self.stage, self.progress = progress.stage, progress
        if was_fetching or self._is_fetching:
            self._watch_start()

    def _watch_start(self) -> None:
        """Let the limit of what the start is at run from now on."""
        if self._load_watch:
            self._load_watch.cancel()
        limit_s = self._limits.download_s if self._is_fetching else self._limits.load_s
        sentence = _SILENT if self._is_fetching else _SLOW
        self._load_watch = asyncio.get_running_loop().call_later(
            limit_s, self._end_start, sentence.format(limit_s)
        )

    def _end_start(self, sentence: str) -> None:
        self._overdue = sentence
        _log.error("%s", sentence)
        self._end_worker("startup")

    def _on_ready(self, info: ModelInfo) -> None:
        if self._load_watch:
            self._load_watch.cancel()
        self.stage, self.info = "ready", info
        self.progress = LoadProgress("ready", 1.0)
        self._is_ready.set()
        self._events.on_worker_ready(info, self._clock() - self._started_at)

    def _on_start_failed(self, text: str) -> None:
        self._lost_because = "startup"
        if self.info is None:
            self._is_closing = True
            self._give_up(EXIT_START_FAILED, text)
        else:
            _log.error("The new worker could not load the model: %s", text)

    def _give_up(self, exit_code: int, message: str) -> None:
        self.stage = "failed"
        self.progress = LoadProgress("failed", None, message)
        self._events.on_fatal(exit_code, message)
        # Wake those who wait for a worker: none will come.
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
        """Look again when *running* would have been silent for too long; end the worker if it
        was."""
        silent_s = self._clock() - running.step_started
        if silent_s >= running.silence_s:
            _log.error("The worker was silent for %.0f s within one step.", silent_s)
            self._end_worker("hang")
            return
        running.watch = asyncio.get_running_loop().call_later(
            running.silence_s - silent_s, self._watch, running
        )

    def _end_worker(self, reason: str) -> None:
        self._lost_because = reason
        self._is_ready.clear()
        if self._handle:
            self._handle.kill()
