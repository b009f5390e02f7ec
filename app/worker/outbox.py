"""One end's sending thread: whoever puts a message never waits for the other end to read it."""

from __future__ import annotations

import queue
import threading

from app.worker.messages import FromWorker, ToWorker
from app.worker.pipe import End


class Outbox:
    """Sends in order, in a thread of its own; `close` returns once everything has left."""

    def __init__(self, pipe: End, *, name: str) -> None:
        self._pipe = pipe
        self._messages: queue.SimpleQueue[FromWorker | ToWorker | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._thread.start()

    def put(self, message: FromWorker | ToWorker) -> None:
        """Send *message* after those before it."""
        self._messages.put(message)

    def hang_up(self) -> None:
        """Send nothing more; do not wait for what is under way."""
        self._messages.put(None)

    def close(self) -> None:
        """Wait until all is sent, and close the pipe."""
        self.hang_up()
        self._thread.join()
        self._pipe.close()

    def _send(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                # The other end has gone; whoever receives here sees it too.
                return
