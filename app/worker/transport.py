"""The pipe between the two processes and the threads that send through it.

A finished image's pixels go through shared memory, which takes a fifth of the time that three
megabytes take through a pipe. Putting a message into an outbox never waits for the other end to
read it.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

from app.errors import StartupError
from app.request_context import RequestContext, current_request
from app.worker.messages import Done, FromWorker, ToWorker

_log = logging.getLogger(__name__)

_WINDOW_BYTES = 2**24
"""A little more than 2048x2048 pixels; larger images go through the pipe."""
SHARED_MEMORY = Path("/dev/shm")


class UnsendableError(Exception):
    """The message cannot be pickled. Nothing of it was sent, and the pipe is unchanged."""


def check_room(workers: int, folder: Path = SHARED_MEMORY) -> None:
    """Check that *folder*, where memory is shared, has room for the pixels of each worker.

    Where it has not, Python would share a file on the disk instead, and say nothing. A folder that
    is not there is `pair`'s business.

    Raises:
        StartupError: it has not.
    """
    try:
        found = os.statvfs(folder)
    except OSError:
        return
    free, needed = found.f_bavail * found.f_frsize, workers * _WINDOW_BYTES
    if free < needed:
        size = f"{-(-needed // 2**20) + 16}m"
        raise StartupError(
            f"{folder} has {free / 1e6:.1f} MB free and {needed / 1e6:.1f} MB are needed, "
            f"{_WINDOW_BYTES / 1e6:.1f} for each worker, since pictures travel through it; make it "
            f"larger, in a container with --shm-size={size} (shm_size in a compose file), "
            f"elsewhere with mount -o remount,size={size} {folder}, and start again."
        )


def pair(context: BaseContext) -> tuple[End, End]:
    """Make both ends, one to keep and one to pass to a process at its start.

    Raises:
        StartupError: there is no memory that two processes can share.
        OSError: no file descriptors are left.
    """
    ours, theirs = context.Pipe()
    try:
        memory = context.RawArray("B", _WINDOW_BYTES)
        is_empty = context.Semaphore(1)
    except OSError as error:
        ours.close()
        theirs.close()
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise StartupError(
            f"No memory can be shared between processes ({error.strerror}): /dev/shm must be a "
            "tmpfs that this user may write to; mount one, in a container with --shm-size or "
            "--tmpfs /dev/shm, and start again."
        ) from None
    return End(ours, memory, is_empty), End(theirs, memory, is_empty)


@dataclass(frozen=True, eq=False, slots=True)
class End:
    """One end: one thread sends, another receives.

    *memory* holds the pixels of one image, from its sending until it is received.
    """

    connection: Connection
    memory: Any
    is_empty: Semaphore

    def send(self, message: FromWorker | ToWorker) -> None:
        """Send *message*; return once the other end has read all but what the pipe buffers.

        Raises:
            UnsendableError: *message* was not sent; the next one can be.
            Exception: the other end has closed (OSError), or the pipe is broken.
        """
        if not isinstance(message, Done):
            self.connection.send_bytes(_write_down(message))
            return
        pixels = message.generated.image.pixels
        words = _write_down(_with_pixels(message, b""))
        if len(pixels) > len(self.memory):
            self.connection.send_bytes(words)
            self.connection.send_bytes(pixels)
            return
        # Blocks while the other end does not read: the process that does not read is killed there.
        self.is_empty.acquire()
        memoryview(self.memory).cast("B")[: len(pixels)] = pixels
        self.connection.send_bytes(words)

    def recv(self) -> Any:
        """Wait for the other end's next message.

        Raises:
            EOFError, OSError: the other end has closed.
            Exception: the message is malformed, and so is everything after it.
        """
        message = self.connection.recv()
        if not isinstance(message, Done):
            return message
        image = message.generated.image
        count = 3 * image.width * image.height
        if count > len(self.memory):
            return _with_pixels(message, self.connection.recv_bytes())
        pixels = bytes(memoryview(self.memory).cast("B")[:count])
        self.is_empty.release()
        return _with_pixels(message, pixels)

    def close(self) -> None:
        """Close this end; the other sees it."""
        self.connection.close()


def _write_down(message: FromWorker | ToWorker) -> memoryview:
    try:
        return ForkingPickler.dumps(message)
    except Exception as error:
        # Any: an object's own pickling may raise anything.
        raise UnsendableError(f"{type(message).__name__} cannot be written down") from error


def _with_pixels(message: Done, pixels: bytes) -> Done:
    generated = message.generated
    return replace(
        message, generated=replace(generated, image=replace(generated.image, pixels=pixels))
    )


Message = FromWorker | ToWorker


class Outbox:
    """Sends in order, in a thread of its own, which closes the pipe when it is told to hang up.

    *on_unsendable* gets a message that cannot be pickled; the pipe still works. After *on_broken*
    it does not, and nothing more is sent. Both are called in the sending thread.
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
        """Queue *message*."""
        self._messages.put(message)

    def hang_up(self) -> None:
        """Send nothing more, then close the pipe; do not wait for the message being sent."""
        self._messages.put(None)

    def close(self) -> None:
        """Wait until all messages are sent and the pipe is closed."""
        self.hang_up()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                if not self._is_broken:
                    self._send(message)
        finally:
            # Only here: a file descriptor that is closed while it is written to may by then be
            # another file's.
            self._pipe.close()
            # This references the memory of a whole image too: it must not wait for the garbage
            # collector.
            del self._on_unsendable, self._on_broken

    def _send(self, message: Message) -> None:
        try:
            self._pipe.send(message)
        except UnsendableError:
            # The request is named here, since this thread has none.
            naming = current_request.set(RequestContext(getattr(message, "request_id", "")))
            _log.exception(
                "A message to the other process could not be written down, job=%s.",
                getattr(message, "job_id", "none"),
            )
            current_request.reset(naming)
            self._on_unsendable(message)
        except (BrokenPipeError, ConnectionResetError):
            # The other end has closed; the receiving thread sees it too.
            self._is_broken = True
        except Exception:
            _log.exception("The pipe to the other process cannot be written to any more.")
            self._is_broken = True
            self._on_broken()
