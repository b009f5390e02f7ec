"""How a message crosses the pipe. A finished picture's pixels follow theirs as they are: to pickle
three megabytes and to read them back takes four times as long."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection

from app.worker.messages import Done, FromWorker, ToWorker


def send(connection: Connection, message: FromWorker | ToWorker) -> None:
    """Send *message*; returns once the other end has taken all but what the pipe holds.

    Raises:
        OSError: the other end has gone.
    """
    if not isinstance(message, Done):
        connection.send(message)
        return
    pixels = message.generated.image.pixels
    connection.send(_with_pixels(message, b""))
    connection.send_bytes(pixels)


def receive(connection: Connection) -> FromWorker:
    """Wait for what the worker says next.

    Raises:
        EOFError, OSError: the other end has gone.
    """
    message: FromWorker = connection.recv()
    if not isinstance(message, Done):
        return message
    return _with_pixels(message, connection.recv_bytes())


def _with_pixels(message: Done, pixels: bytes) -> Done:
    generated = message.generated
    return replace(
        message, generated=replace(generated, image=replace(generated.image, pixels=pixels))
    )
