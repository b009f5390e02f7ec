"""The worker's side of the pipe: receive, call the engine, always answer.

Three threads: one receives (so that a cancellation is seen between two steps), one sends (so that
the card goes on with the next job while three megabytes of pixels leave), and the caller's own,
which alone touches the engine. `run` is free of process matters, so tests run the very same loop in
a thread.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from app import logs
from app.domain import Engine, LoadProgress, Progress, Stage
from app.errors import Kind, KleinError
from app.worker.messages import (
    Cancel,
    Done,
    Failed,
    Generate,
    Loading,
    Ready,
    StartFailed,
    Stepped,
    Stop,
    ToWorker,
)
from app.worker.outbox import Outbox
from app.worker.pipe import End

_log = logging.getLogger(__name__)

EXIT_FATAL = 13
"""The worker's own word for: the card is unusable in this process, start another."""

EXIT_START_FAILED = 14

_REMEMBERED = 64
"""Jobs that are known to have ended, so that a late cancellation of one is dropped."""

EngineFactory = Callable[[Any], Engine]


def main(pipe: End, make_engine: EngineFactory, config: object, log: tuple[str, str]) -> None:
    """Run as the worker process: the parent alone decides when to stop, and its death ends this
    one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(style=log[0], level=log[1])
    code = run(pipe, make_engine, config, on_orphaned=lambda: _leave(0))
    # Not sys.exit: a card that is lost may hang its library's clean-up.
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process at once, but for its last lines in the log."""
    logs.flush()
    os._exit(code)


def run(
    pipe: End,
    make_engine: EngineFactory,
    config: object,
    *,
    on_orphaned: Callable[[], object] = lambda: None,
) -> int:
    """Load, then answer every message until told to stop; return the process's exit code."""
    inbox = _Inbox(pipe, on_orphaned)
    outbox = Outbox(pipe, name="worker outbox")
    try:
        engine = _load(make_engine, config, outbox)
        if engine is None:
            return EXIT_START_FAILED
        try:
            for message in inbox.jobs():
                if _serve(engine, message, inbox, outbox) is Kind.FATAL:
                    return EXIT_FATAL
        finally:
            engine.close()
        return 0
    finally:
        outbox.close()


def _load(make_engine: EngineFactory, config: object, outbox: Outbox) -> Engine | None:
    def on_progress(progress: LoadProgress) -> None:
        outbox.put(Loading(progress))

    # Importing and compiling make millions of objects that stay; looking through them for garbage
    # again and again takes a tenth of a start.
    gc.disable()
    try:
        engine = make_engine(config)
        outbox.put(Ready(engine.load(on_progress)))
    except KleinError as error:
        _log.debug("The model did not load.", exc_info=True)
        outbox.put(StartFailed(error.message))
    except Exception:
        _log.exception("The model could not be loaded.")
        outbox.put(StartFailed("The model could not be loaded; the log above says why."))
    else:
        return engine
    finally:
        gc.enable()
    return None


def _serve(engine: Engine, message: Generate, inbox: _Inbox, outbox: Outbox) -> Kind | None:
    """Make one picture and answer, whatever happens; return the kind of error, if any."""
    job_id, steps = message.job_id, message.spec.num_inference_steps

    def on_progress(progress: Progress) -> None:
        outbox.put(Stepped(job_id, progress))

    def on_card_free() -> None:
        outbox.put(Stepped(job_id, Progress(Stage.CARD_FREE, steps, steps)))

    hiding = logs.hidden.set((message.spec.prompt,))
    try:
        generated = engine.generate(message.spec, on_progress, lambda: inbox.is_cancelled(job_id))
    except KleinError as error:
        _log.debug("A job failed, job=%s.", job_id, exc_info=True)
        outbox.put(Failed(job_id, error.kind, error.message))
        return error.kind
    except Exception:
        _log.exception("A job failed in a way nobody foresaw, job=%s.", job_id)
        text = "The picture could not be made; the service's log says why."
        outbox.put(Failed(job_id, Kind.FAILED, text))
        return Kind.FAILED
    finally:
        logs.hidden.reset(hiding)
    on_card_free()
    outbox.put(Done(job_id, generated))
    return None


class _Inbox:
    """Receives in a thread of its own; jobs wait in order, cancellations are known at once."""

    def __init__(self, pipe: End, on_orphaned: Callable[[], object]) -> None:
        self._pipe = pipe
        self._on_orphaned = on_orphaned
        self._jobs: queue.SimpleQueue[Generate | Stop] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)
        self._is_orphaned = False
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def jobs(self) -> Iterator[Generate]:
        """Yield the jobs as they come, until told to stop."""
        while isinstance(message := self._jobs.get(), Generate):
            yield message
            with self._lock:
                self._cancelled.discard(message.job_id)
                self._ended.append(message.job_id)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether nobody waits for *job_id* any more."""
        return self._is_orphaned or job_id in self._cancelled

    def _receive(self) -> None:
        while True:
            try:
                message: ToWorker = self._pipe.recv()
            except (EOFError, OSError):
                self._is_orphaned = True
                self._jobs.put(Stop())
                self._on_orphaned()
                return
            if isinstance(message, Cancel):
                self._cancel(message.job_id)
            else:
                self._jobs.put(message)

    def _cancel(self, job_id: str) -> None:
        """Note it, unless the job has just ended: nobody would ever forget it again."""
        with self._lock:
            if job_id not in self._ended:
                self._cancelled.add(job_id)
