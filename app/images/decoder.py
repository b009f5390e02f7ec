"""A decoder: a process that decodes the images of one request, within limits, and exits.

Clients' files are decoded by C libraries, for which now and then a file is found that makes them
run for hours, take all memory, or execute the file's code. So they are decoded in a process with
limits that the kernel enforces, which holds no secrets and serves no other request afterwards.

Both directions carry plain data: a message is its length in four bytes and JSON. Unlike
unpickling, this gives a decoder that an image has taken over no way to run code in the service.
Files, then pixels, lie in memory that both share, from its start and one behind the other; the
service reads and writes it as a file, since a page of it that a decoder has cut off would end a
process which had mapped it. In order:

    to the decoder    {"files": [[bytes, is_base64, param, repaints], ...], "has_mask": ...,
                      "size": ...}, when the files are there, a mask last
    from it           {"begin": [param, code]}                before each file, once
    from it           {"nearest": [width, height]}            once, answered with [width, height]
    from it           {"refused": [message, param, code]}     or
                      {"references": [[width, height], ...], "mask": ...,
                      "is_black_and_white": ...}, when the pixels are there, a mask's last
"""

from __future__ import annotations

import gc
import io
import json
import mmap
import os
import resource
import socket
import warnings
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest
from app.images.preparing import Size, Upload, prepare

LENGTH_BYTES = 4
WARM_BYTES = 16 * 2**20
SHARED_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request's images may cost, and how long a decoder may take to start."""

    cpu_s: int = 5
    wall_s: float = 60.0
    """For a machine on which five seconds of CPU time take longer."""
    memory_bytes: int = 2**30
    """Address space in bytes; the kernel limits no other measure of memory reliably."""
    start_s: float = 10.0


def serve(connection: socket.socket, shared: io.FileIO, limits: Limits) -> None:
    """Decode the images of one request; return once it is answered or the other end has closed."""
    restrict(limits)
    gc.disable()
    # Have the kernel allocate the memory of a one-megapixel image while no request waits.
    bytearray(b"\1") * WARM_BYTES
    os.posix_fallocate(shared.fileno(), 0, SHARED_BYTES)
    # A library's warning may quote the file.
    warnings.simplefilter("ignore")
    wire = _Wire(connection, shared, _mapped(shared, SHARED_BYTES))
    try:
        asked = wire.read()
        images = wire.uploads(asked["files"])
        mask = images.pop() if asked["has_mask"] else None
        wire.answer(images, mask, asked["size"] and tuple(asked["size"]))
    except (EOFError, OSError):
        return  # the client has disconnected


def restrict(limits: Limits) -> None:
    """Set the limits for this process; beyond its CPU time the kernel kills it."""
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    # What it writes to shared memory counts as a file, not as address space.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pack(message: object) -> bytes:
    """Encode one message."""
    text = json.dumps(message).encode()
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


def _mapped(shared: io.FileIO, size_bytes: int) -> mmap.mmap:
    """Map the beginning of shared memory, with all its pages, to read."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return mmap.mmap(shared.fileno(), size_bytes, flags, mmap.PROT_READ)


@dataclass(slots=True)
class _Wire:
    """The decoder's end of the connection, and the memory that it shares with the service."""

    connection: socket.socket
    shared: io.FileIO
    mapped: mmap.mmap

    def receive(self, size_bytes: int) -> memoryview:
        """Wait for *size_bytes* bytes; raises `EOFError` when the other end has closed."""
        data = memoryview(bytearray(size_bytes))
        rest = data
        while rest:
            # Fewer bytes than asked for arrive where the process was stopped meanwhile.
            if not (count := self.connection.recv_into(rest, flags=socket.MSG_WAITALL)):
                raise EOFError
            rest = rest[count:]
        return data

    def read(self) -> Any:
        """Wait for the next message."""
        length = int.from_bytes(self.receive(LENGTH_BYTES), "big")
        return json.loads(bytes(self.receive(length)))

    def uploads(self, described: list[tuple[int, bool, str, str]]) -> list[Upload]:
        """Return the files, which lie in shared memory."""
        total = sum(size_bytes for size_bytes, *_ in described)
        rest = memoryview(self.mapped if total <= SHARED_BYTES else _mapped(self.shared, total))
        uploads = []
        for size_bytes, is_base64, param, repaints in described:
            uploads.append(Upload(rest[:size_bytes], param, is_base64, repaints))
            rest = rest[size_bytes:]
        return uploads

    def answer(self, images: list[Upload], mask: Upload | None, size: Size | None) -> None:
        """Decode, and send the result."""
        try:
            edit = prepare(images, mask, size, self._nearest, self._begin)
        except InvalidRequest as error:
            self._send({"refused": [error.message, error.param, error.code]})
        else:
            # Over the files: they have been decoded. The service never moves the file's offset.
            for image in edit.references:
                self._write(image.pixels)
            if edit.mask is not None:
                self._write(edit.mask.weights)
            self._send(
                {
                    "references": [[image.width, image.height] for image in edit.references],
                    "mask": edit.mask and [edit.mask.width, edit.mask.height],
                    "is_black_and_white": edit.is_black_and_white,
                }
            )

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.shared.write(rest) :]

    def _begin(self, upload: Upload, code: str) -> None:
        self._send({"begin": [upload.param, code]})

    def _nearest(self, width: int, height: int) -> Size:
        self._send({"nearest": [width, height]})
        found = self.read()
        return found[0], found[1]

    def _send(self, message: object) -> None:
        self.connection.sendall(pack(message))
