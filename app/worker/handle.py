"""The parent's hold on one worker process: start it, talk to it, end it. It knows no policy."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from typing import Protocol

from app.worker import child, pipe
from app.worker.messages import FromWorker, ToWorker
from app.worker.outbox import Outbox


class Listener(Protocol):
    """Who is told, in the event loop's thread, what a worker says and that it has gone."""

    def on_message(self, handle: WorkerHandle, message: FromWorker) -> None:
        """A message has come."""

    def on_exit(self, handle: WorkerHandle, exit_code: int) -> None:
        """The process has gone, and every message that it sent has been delivered."""


class WorkerHandle:
    """One process from its start to its end. Made and used in the event loop's thread.

    A thread of its own receives, so neither a large picture nor a dying process blocks the loop.
    """

    def __init__(
        self,
        listener: Listener,
        make_engine: child.EngineFactory,
        config: object,
        log: tuple[str, str],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._pipe, theirs = pipe.pair(context)
        self._process = context.Process(
            target=child.main, args=(theirs, make_engine, config, log), name="klein worker"
        )
        self._process.start()
        # Ours must be the only end left here, or the worker's death would not be heard.
        theirs.close()
        self._exited = asyncio.Event()
        self._outbox = Outbox(self._pipe, name="worker pipe, down")
        threading.Thread(
            target=self._receive, args=(self._pipe,), name="worker pipe, up", daemon=True
        ).start()

    def __repr__(self) -> str:
        state = "gone" if self._exited.is_set() else "alive"
        return f"<WorkerHandle pid {self.pid}, {state}>"

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid or 0

    def send(self, message: ToWorker) -> None:
        """Hand *message* to the worker; one that has gone takes no notice."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the process now; a hung kernel does not keep it."""
        self._process.kill()

    async def wait(self) -> None:
        """Return once the process has gone."""
        await self._exited.wait()

    def _receive(self, ours: pipe.End) -> None:
        while True:
            try:
                message = ours.recv()
            except (EOFError, OSError):
                break
            self._tell(self._listener.on_message, message)
        self._process.join()
        self._tell(self._on_exit, None)

    def _tell(self, callback: Callable[..., None], message: FromWorker | None) -> None:
        arguments = (self, message) if message is not None else ()
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop has closed: nobody is left to be told.
            return

    def _on_exit(self) -> None:
        self._outbox.hang_up()
        self._pipe.close()
        self._exited.set()
        code = self._process.exitcode
        self._listener.on_exit(self, 0 if code is None else code)
