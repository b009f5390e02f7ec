"""The pipe between the two processes. A finished picture's pixels take another way: through memory
that both see, which takes a fifth of the time that three megabytes take through a pipe."""

from __future__ import annotations

import errno
import multiprocessing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Semaphore
from typing import Any

from app.errors import StartupError
from app.worker.messages import Done, FromWorker, ToWorker

_WINDOW_BYTES = 2**24
"""2048x2048 pixels and some; what is larger goes through the pipe."""


class UnsendableError(Exception):
    """The message cannot be written down. Nothing of it was sent, and the pipe is as it was."""


def pair(context: BaseContext | None = None) -> tuple[End, End]:
    """Make both ends, one to keep and one to give to a process at its start.

    Raises:
        StartupError: there is no memory that two processes can share.
        OSError: no descriptors are left.
    """
    context = context or multiprocessing.get_context()
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

    *memory* holds the pixels of one picture, from its sending until it is received.
    """

    connection: Connection
    memory: Any
    is_empty: Semaphore

    def send(self, message: FromWorker | ToWorker) -> None:
        """Send *message*; returns once the other end has taken all but what the pipe holds.

        Raises:
            UnsendableError: *message* was not sent; the next one can be.
            Exception: the other end has gone (OSError), or the pipe cannot be used any more.
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
        # Waits as long as the other end does not read: there it is killed that does not.
        self.is_empty.acquire()
        memoryview(self.memory).cast("B")[: len(pixels)] = pixels
        self.connection.send_bytes(words)

    def recv(self) -> Any:
        """Wait for the other end's next message.

        Raises:
            EOFError, OSError: the other end has gone.
            Exception: what came makes no sense, and what comes after it would make none either.
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
        # Any: what an object does when it is pickled is its own affair.
        raise UnsendableError(f"{type(message).__name__} cannot be written down") from error


def _with_pixels(message: Done, pixels: bytes) -> Done:
    generated = message.generated
    return replace(
        message, generated=replace(generated, image=replace(generated.image, pixels=pixels))
    )
