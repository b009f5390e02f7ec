"""The parent's handle of one worker process: start it, exchange messages, end it. No policy.

Any failure between the two processes ends the worker, and its end is reported once, within a known
time: the process is killed where it does not exit, and abandoned where that does not help.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing.process
import os
import select
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess, SpawnProcess

from app.engine.config import EngineConfig
from app.errors import GenerationFailed
from app.worker import child
from app.worker.fork_server import Context
from app.worker.messages import Failed, FromWorker, Generate, ToWorker
from app.worker.transport import End, Message, Outbox, pair

_log = logging.getLogger(__name__)

_REPORT_S = 1.0
"""For the fork server to report an exit."""
_NOT_SENT = "The request could not be handed to the worker; the service's log says why."


@dataclass(frozen=True, eq=False, slots=True)
class Launched:
    """A process that was started, with this process's end of its pipe; see `launch`."""

    process: SpawnProcess | ForkServerProcess
    pipe: End
    pidfd: int
    """Says when it has ended, and kills it, whoever is told of its end and reaps it."""

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def has_ended(self, within_s: float) -> bool:
        """Wait for its end for at most *within_s* seconds; return whether it has come."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(1000 * within_s))

    def close(self) -> None:
        """Close its file descriptors, but not the pipe."""
        os.close(self.pidfd)
        with suppress(ValueError):  # Its end may not have been reported.
            self.process.close()


def launch(
    make_engine: child.EngineFactory, config: EngineConfig, log: tuple[str, str], context: Context
) -> Launched:
    """Start a worker with *context*; it may take as long as imports do.

    Raises:
        Exception: it could not be started, and nothing is left of it.
    """
    with ExitStack() as undo:
        pipe, theirs = pair(context)
        undo.callback(pipe.close)
        # The worker must hold the only copy of its end, or its death would not be seen as EOF.
        with closing(theirs):
            process = context.Process(
                target=child.main, args=(theirs, make_engine, config, log), name="klein worker"
            )
            process.start()
        undo.callback(process.kill)
        launched = Launched(process, pipe, os.pidfd_open(process.pid or 0))
        undo.pop_all()
    return launched


class WorkerProcess:
    """One process from its start to its end. Made and used in the event loop's thread.

    *on_message* gets each message of the worker, and *on_exit* its exit after the last of them,
    both in the loop's thread. Without an exit code the process could not be ended, and is
    abandoned. A thread of its own receives, so neither a large image nor a dying process blocks
    the loop.
    """

    def __init__(
        self,
        on_message: Callable[[WorkerProcess, FromWorker], None],
        on_exit: Callable[[WorkerProcess, int | None], None],
        launched: Launched,
        leave_s: float,
    ) -> None:
        """Take the process over; it has *leave_s* seconds to exit after it hung up or was killed.

        Raises:
            Exception: it cannot be watched, and was killed.
        """
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        self._launched = launched
        self._pipe = launched.pipe
        self._leave_s = leave_s
        self._exited = asyncio.Event()
        self.pid = launched.process.pid or 0
        with ExitStack() as undo:
            undo.callback(self._pipe.close)
            undo.callback(self._end_unwatched)
            self._outbox = Outbox(
                self._pipe,
                name="worker pipe, down",
                on_unsendable=self._on_unsendable,
                on_broken=partial(self._tell, self.kill),
            )
            undo.callback(self._outbox.hang_up)
            threading.Thread(target=self._receive, name="worker pipe, up", daemon=True).start()
            undo.pop_all()

    def __repr__(self) -> str:
        state = "gone" if self._exited.is_set() else "alive"
        return f"<WorkerHandle pid {self.pid}, {state}>"

    def send(self, message: ToWorker) -> None:
        """Send *message* to the worker; without effect where it has exited."""
        self._outbox.put(message)

    def kill(self) -> None:
        """Kill the process now; a hung kernel does not prevent it."""
        if not self._exited.is_set():
            self._launched.kill()
            self._loop.call_later(self._leave_s, self._end, None)

    async def wait(self) -> None:
        """Return once the process has exited."""
        await self._exited.wait()

    def _end_unwatched(self) -> None:
        """End a process whose threads could not be started."""
        self._launched.kill()
        if self._launched.has_ended(self._leave_s):
            self._exit_code()
            self._launched.close()
        else:
            self._disown()

    def _receive(self) -> None:
        """Deliver the worker's messages, then wait for its exit."""
        try:
            while True:
                self._tell(self._deliver, self._pipe.recv())
        except (EOFError, OSError):
            # It has closed the pipe, and is exiting or dead.
            self._launched.has_ended(self._leave_s)
        except Exception:
            _log.exception("What the worker sent cannot be read.")
        self._launched.kill()
        has_ended = self._launched.has_ended(self._leave_s)
        self._tell(self._end, self._exit_code() if has_ended else None)

    def _exit_code(self) -> int:
        """Return the exit code of a process that has ended; -9 where nobody reports it."""
        process = self._launched.process
        process.join(_REPORT_S)
        return -signal.SIGKILL if process.exitcode is None else process.exitcode

    def _tell(self, callback: Callable[..., None], *arguments: FromWorker | int | None) -> None:
        # The loop may have closed: then there is no listener left.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _deliver(self, message: FromWorker) -> None:
        try:
            self._on_message(self, message)
        except Exception:
            _log.exception("What the worker said could not be taken in.")
            self.kill()

    def _on_unsendable(self, message: Message) -> None:
        """Fail the job that cannot be sent; kill the worker where it is any other message."""
        if isinstance(message, Generate):
            error = GenerationFailed(_NOT_SENT)
            self._tell(self._deliver, Failed.of(message.job_id, error))
        else:
            self._tell(self.kill)

    def _disown(self) -> None:
        """Let this process exit without it: Python's clean-up joins every child it knows."""
        _log.error("The worker, process %s, was killed and does not go.", self.pid)
        known = multiprocessing.process._children  # type: ignore[attr-defined]
        known.discard(self._launched.process)

    def _end(self, exit_code: int | None) -> None:
        """Report the process's end, once; None abandons it.

        SIGKILL cannot end a process blocked in a driver.
        """
        if self._exited.is_set():
            return
        if exit_code is None:
            self._disown()
        else:
            # Close its file descriptors at once.
            self._launched.close()
        self._outbox.hang_up()
        self._exited.set()
        self._on_exit(self, exit_code)
