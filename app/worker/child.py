"""The worker's side of the pipe: receive, call the engine, always answer.

Three threads: one receives (so that a cancellation is seen between two denoising steps), one sends
(so that the GPU starts the next job while three megabytes of pixels are sent), and the caller's
own, which alone uses the engine. `run` does not depend on its process, so tests run the same loop
in a thread.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from app import logs
from app.domain import Engine, Progress, Stage
from app.engine.config import EngineConfig
from app.errors import SEE_LOG, FilesFault, GenerationFailed, Kind, KleinError
from app.request_context import RequestContext, current_request
from app.worker.messages import (
    Cancel,
    Done,
    Failed,
    Generate,
    Ping,
    Pong,
    StartFailed,
    Stepped,
    Stop,
    ToWorker,
)
from app.worker.placement import settle
from app.worker.transport import End, Message, Outbox

_log = logging.getLogger(__name__)

EXIT_FATAL = 13
"""Exit code: the GPU is unusable in this process, start another."""

EXIT_START_FAILED = 14

EXIT_PIPE = 15
"""Exit code: the pipe to the parent is broken, or an exception was unexpected."""

EngineFactory = Callable[[EngineConfig], Engine]


def main(pipe: End, make_engine: EngineFactory, config: EngineConfig, log: tuple[str, str]) -> None:
    """Run as the worker process: the parent alone stops it, and the parent's end ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(style=log[0], level=log[1])
    code = EXIT_PIPE
    try:
        if config.place is not None:
            settle(config.place)
        code = run(pipe, make_engine, config, leave=_leave)
    except BaseException:
        _log.exception("The worker failed in a way nobody foresaw.")
    # Not sys.exit: a lost GPU may hang its library's clean-up.
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process at once, after flushing the log."""
    logs.flush()
    os._exit(code)


def run(
    pipe: End,
    make_engine: EngineFactory,
    config: EngineConfig,
    *,
    leave: Callable[[int], object] = lambda code: None,
) -> int:
    """Load, then answer every message until told to stop; return the process's exit code.

    *leave* is called from another thread when the pipe is broken.
    """
    inbox = _Inbox(pipe, leave)
    outbox = Outbox(
        pipe,
        name="worker outbox",
        on_unsendable=lambda message: _on_unsendable(message, outbox, leave),
        on_broken=lambda: leave(EXIT_PIPE),
    )
    try:
        engine = _load(make_engine, config, outbox)
        if engine is None:
            return EXIT_START_FAILED
        try:
            for message in inbox.work():
                if isinstance(message, Ping):
                    outbox.put(Pong())
                elif _serve(engine, message, inbox, outbox) is Kind.FATAL:
                    return EXIT_FATAL
        finally:
            engine.close()
        return 0
    finally:
        outbox.close()


def _on_unsendable(message: Message, outbox: Outbox, leave: Callable[[int], object]) -> None:
    """Fail the job whose image cannot be sent; exit where it is a message that the parent needs."""
    if isinstance(message, Done):
        outbox.put(Failed.of(message.job_id, GenerationFailed(SEE_LOG)))
    elif not isinstance(message, Stepped):
        leave(EXIT_PIPE)


def _load(make_engine: EngineFactory, config: EngineConfig, outbox: Outbox) -> Engine | None:
    # Importing makes millions of permanent objects; traversing them for garbage again and again
    # takes a tenth of a start.
    gc.disable()
    try:
        engine = make_engine(config)
        outbox.put(engine.load(outbox.put))
    except KleinError as error:
        _log.debug("The model did not load.", exc_info=True)
        outbox.put(StartFailed(error.message, isinstance(error, FilesFault)))
    except Exception:
        _log.exception("The model could not be loaded.")
        outbox.put(StartFailed("The model could not be loaded; the log above says why."))
    else:
        return engine
    finally:
        gc.enable()
    return None


def _serve(engine: Engine, message: Generate, inbox: _Inbox, outbox: Outbox) -> Kind | None:
    """Generate one image and answer, whatever happens; return the kind of error, if any."""
    job_id, steps = message.job_id, message.spec.num_inference_steps

    def on_progress(progress: Progress) -> None:
        outbox.put(Stepped(job_id, progress))

    hiding = logs.hidden.set((message.spec.prompt,))
    naming = current_request.set(RequestContext(message.request_id))
    try:
        generated = engine.generate(message.spec, on_progress, lambda: inbox.is_cancelled(job_id))
    except KleinError as error:
        _log.debug("A job failed, job=%s.", job_id, exc_info=True)
        outbox.put(Failed.of(job_id, error))
        return error.kind
    except Exception:
        _log.exception("A job failed in a way nobody foresaw, job=%s.", job_id)
        outbox.put(Failed.of(job_id, GenerationFailed(SEE_LOG)))
        return Kind.FAILED
    finally:
        current_request.reset(naming)
        logs.hidden.reset(hiding)
    outbox.put(Stepped(job_id, Progress(Stage.GPU_FREE, steps, steps)))
    outbox.put(Done(job_id, generated))
    return None


class _Inbox:
    """Receives in a thread of its own; jobs wait in order, cancellations are seen at once."""

    def __init__(self, pipe: End, leave: Callable[[int], object]) -> None:
        self._pipe = pipe
        self._leave = leave
        self._waiting: queue.SimpleQueue[Generate | Ping | Stop] = queue.SimpleQueue()
        self._cancelled: dict[str, threading.Event] = {}
        """For each job that has not ended whether it was cancelled."""
        self._is_orphaned = False
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def work(self) -> Iterator[Generate | Ping]:
        """Yield messages to handle as they arrive, until told to stop."""
        while not isinstance(message := self._waiting.get(), Stop):
            yield message
            if isinstance(message, Generate):
                del self._cancelled[message.job_id]

    def is_cancelled(self, job_id: str) -> bool:
        """Return whether *job_id*, which has not ended, was cancelled."""
        return self._is_orphaned or self._cancelled[job_id].is_set()

    def _receive(self) -> None:
        code = 0
        try:
            while True:
                self._take(self._pipe.recv())
        except (EOFError, OSError):
            _log.debug("The parent has gone.")
        except Exception:
            _log.exception("What the parent sent cannot be read.")
            code = EXIT_PIPE
        self._is_orphaned = True
        self._waiting.put(Stop())
        self._leave(code)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Cancel):
            # None where the job has ended meanwhile.
            if cancelled := self._cancelled.get(message.job_id):
                cancelled.set()
            return
        if isinstance(message, Generate):
            self._cancelled[message.job_id] = threading.Event()
        self._waiting.put(message)
