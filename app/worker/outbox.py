"""One end's sending thread: whoever puts a message never waits for the other end to read it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from app import logs
from app.worker.messages import FromWorker, Generate, ToWorker
from app.worker.pipe import End, UnsendableError

_log = logging.getLogger(__name__)

Message = FromWorker | ToWorker


class Outbox:
    """Sends in order, in a thread of its own, which closes the pipe when it is told to hang up.

    *on_unsendable* gets a message that cannot be written down; the pipe is whole. After *on_broken*
    it is not, and nothing more is sent. Both are called in the sending thread.
    """

    def __init__(
        self,
        pipe: End,
        *,
        name: str,
        on_unsendable: Callable[[Message], object],
        on_broken: Callable[[], object],
    ) -> None:
        self._pipe = pipe
        self._on_unsendable = on_unsendable
        self._on_broken = on_broken
        self._is_broken = False
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send *message* after those before it."""
        self._messages.put(message)

    def hang_up(self) -> None:
        """Send nothing more, then close the pipe; do not wait for what is under way."""
        self._messages.put(None)

    def close(self) -> None:
        """Wait until all is sent and the pipe is closed."""
        self.hang_up()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                if not self._is_broken:
                    self._send(message)
        finally:
            # Here and nowhere else: a number that is closed while it is written to may by then be
            # another file's.
            self._pipe.close()
            # Who owns this owns the memory of a whole picture too: it is not to wait for a round of
            # the garbage collector.
            del self._on_unsendable, self._on_broken

    def _send(self, message: Message) -> None:
        try:
            self._pipe.send(message)
        except UnsendableError:
            _log_unsendable(message)
            self._on_unsendable(message)
        except (BrokenPipeError, ConnectionResetError):
            # The other end has gone; whoever receives here sees it too.
            self._is_broken = True
        except Exception:
            _log.exception("The pipe to the other process cannot be written to any more.")
            self._is_broken = True
            self._on_broken()


def _log_unsendable(message: Message) -> None:
    """Name what it was about: the job, and the request where the message knows it."""
    request_id = message.request_id if isinstance(message, Generate) else ""
    naming = logs.request_id.set(request_id)
    _log.exception(
        "A message to the other process could not be written down, job=%s.",
        getattr(message, "job_id", "none"),
    )
    logs.request_id.reset(naming)
