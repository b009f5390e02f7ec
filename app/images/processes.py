"""The service's handles of the fork server and of one busy decoder.

All of this waits on the event loop only, except `Server.end`, which is for the service's own end. A
decoder may say anything once an image has taken it over: its messages are validated before they are
used, and neither their number nor what they announce holds the event loop or takes more memory than
what was sent to it can need.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from app.domain import Mask, RawImage
from app.errors import InvalidRequest
from app.images.decoder import LENGTH_BYTES, Limits, pack
from app.images.preparing import Edit, Size, Upload
from app.images.uploads import MAX_PIXELS, MIN_SIDE, REFERENCE_MULTIPLE, REFERENCE_PIXELS

ENDED_EARLY = (OSError, EOFError, ValueError, LookupError, TypeError)
"""Errors of a decoder that has exited, sends invalid messages, or takes too long."""

MAX_MESSAGE_BYTES = 65_536
_PIECE_BYTES = 64 * 1024
"""Copied to or from shared memory before yielding to the event loop."""
_PART_BYTES = 512 * 1024
"""Memory for pixels that is zeroed at a time; megabytes take milliseconds."""
_END_S = 1.0
"""For the fork server to exit by itself once its control socket is closed."""
_END_LOOK_S = 0.002
"""Between two polls at the service's end, which waits for it."""
_LOOK_S = 0.05
"""Between two polls whether it has exited, or has room for another id."""
_REPLACE_S = 1.0
"""Until a decoder is replaced whose ends this process had no descriptors for."""
_ENVIRONMENT = ("PATH", "PYTHON", "LD_", "LC_", "LANG", "TZ")
"""Prefixes of the environment variables that a decoder gets: no keys, no tokens."""
_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=268435456"
}
"""Huge pages where the kernel has them, and freed memory is kept.

A process faults in each page of its memory, which takes ten milliseconds for an image of one
megapixel.
"""
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; from app.images.fork_server import main; "
    "main(*sys.argv[1:4])"
)


class Server:
    """The fork server as its parent sees it. Raises `OSError` where it cannot be started."""

    def __init__(
        self,
        size: int,
        limits: Limits,
        on_decoder: Callable[[Decoder], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_decoder = on_decoder
        self._on_lost = on_lost
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = (size, limits.cpu_s, limits.memory_bytes)
        kept = {name: text for name, text in os.environ.items() if name.startswith(_ENVIRONMENT)}
        with theirs:
            try:
                # As its stdin, since its own file descriptor number could be any. In a process
                # group of its own, to kill it with its decoders.
                self._process = subprocess.Popen(
                    # With this process's own path, as a spawned one would have, and never the
                    # current folder.
                    [sys.executable, "-P", "-c", _PROGRAM, *map(str, numbers), *sys.path],
                    stdin=theirs.fileno(),
                    env=kept | _MEMORY,
                    process_group=0,
                )
            except OSError:
                self._control.close()
                raise
        self.pid = self._process.pid
        self._control.setblocking(False)
        self._doomed: deque[int] = deque()
        """Decoders whose ids could not be sent yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        # It outlives the request that starts it.
        Context().run(self._loop.add_reader, self._control, self.receive)

    def __repr__(self) -> str:
        return f"<fork server {self.pid}>"

    def kill_decoder(self, pid: int) -> None:
        """Have its decoder *pid* killed, if it lives, as soon as the socket has room."""
        self._doomed.append(pid)
        self._send_doomed()

    def end(self) -> None:
        """Kill it, with the decoders, and wait: milliseconds, or a second where it hangs."""
        self._disconnect()
        waits_until = time.monotonic() + _END_S
        while not self._has_exited() and time.monotonic() < waits_until:
            time.sleep(_END_LOOK_S)
        self._kill_group()
        self._process.wait()

    def kill(self) -> None:
        """Kill it, with the decoders, and return at once."""
        self._disconnect()
        self._kill_group()
        self._reap()

    def receive(self) -> None:
        """Receive the messages sent so far, up to EOF."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._control, 64, 2)
            except BlockingIOError:
                return
            except OSError:
                message, descriptors = b"", []
            if not message:
                break
            if len(descriptors) < 2:  # this process may open no more
                for descriptor in descriptors:
                    os.close(descriptor)
                # Not at once: the next one may fare no better.
                pid, context = int(message), Context()
                self._loop.call_later(_REPLACE_S, self.kill_decoder, pid, context=context)
                continue
            connection = socket.socket(fileno=descriptors[0])
            shared = io.FileIO(descriptors[1], "r+b")
            self._on_decoder(Decoder(int(message), connection, shared))
        self.kill()
        self._on_lost()

    def _send_doomed(self) -> None:
        """Send the ids that are left; those for which the socket has no room, in a moment."""
        if self._control.fileno() < 0:
            return  # killed meanwhile, with its decoders
        try:
            while self._doomed:
                self._control.send(b"%d" % self._doomed[0])
                self._doomed.popleft()
        except ConnectionError:
            self._doomed.clear()  # it has ended, and its group is killed once EOF is received
        except OSError:
            if self._timer is None:
                self._timer = self._loop.call_later(_LOOK_S, self._try_again, context=Context())

    def _try_again(self) -> None:
        self._timer = None
        self._send_doomed()

    def _disconnect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._control)
        self._control.close()

    def _has_exited(self) -> bool:
        """Return whether it has exited, without reaping it."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # the kernel has reaped it, as it does where SIGCHLD is ignored

    def _kill_group(self) -> None:
        """Kill it and its decoders, which are left behind where somebody else has killed it."""
        # Before it is reaped, since its process id may be reused after.
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Poll until it has exited."""
        if self._process.poll() is None:
            self._loop.call_later(_LOOK_S, self._reap, context=Context())


@dataclass(eq=False, slots=True)
class Decoder:
    """One decoder as its user sees it."""

    pid: int
    connection: socket.socket
    shared: io.FileIO
    """Memory that it has too. Never mapped here: it may be cut off at any time."""
    began: tuple[str, str] | None = None
    """Param and code of the file that it began last; None before the first."""
    is_orphan: bool = False
    """Whether the fork server has exited, and was killed with it."""

    def __post_init__(self) -> None:
        self.connection.setblocking(False)

    def is_alive(self) -> bool:
        """Return whether it is alive; an idle decoder sends nothing."""
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close this process's ends; the decoder exits once it finds out."""
        self.connection.close()
        self.shared.close()

    def abort(self) -> None:
        """Shut the connection down while it is in use."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: Size | None,
        nearest: Callable[[int, int], Size],
    ) -> Edit:
        """Share the files and receive the result.

        Raises:
            ENDED_EARLY: the process has exited, or its messages are invalid.
            InvalidRequest: as the decoder reports it.
        """
        files = [*images, mask] if mask is not None else images
        described = [
            [len(each.content), each.is_base64, each.param, each.repaints] for each in files
        ]
        asked = {"files": described, "has_mask": mask is not None, "size": size}
        await self._write([each.content for each in files])
        await self._send(asked)
        params = [each.param for each in files]
        result: Size | None = None
        while True:
            message = await self._receive_message()
            if "begin" in message:
                param, code = _texts(message["begin"], 2)
                params.remove(param)  # raises `ValueError` for what has begun, or was not sent
                self.began = param, code
            elif "nearest" in message and result is None:
                result = nearest(*(size or _sides(message["nearest"], REFERENCE_PIXELS)))
                await self._send(result)
            elif "refused" in message:
                text, param, code = _texts(message["refused"], 3)
                raise InvalidRequest(text, param=param, code=code)
            elif result is not None:
                return await self._receive_edit(message, len(images), mask is not None, result)
            else:
                raise ValueError("no size was asked for")

    async def _receive_edit(
        self, message: dict[str, Any], images: int, has_mask: bool, result: Size
    ) -> Edit:
        """Receive what *images* and a mask can become, of an edit with the size *result*."""
        sizes = [_sides(each, math.prod(result)) for each in message["references"][:has_mask]]
        sizes += [_reference_sides(each) for each in message["references"][has_mask:]]
        mask_size = None if message["mask"] is None else _sides(message["mask"], MAX_PIXELS)
        if len(sizes) != images or (mask_size is not None) != has_mask:
            raise ValueError("not what was sent")
        if has_mask and sizes[0] != result:
            raise ValueError("not the size that the image under a mask gets")
        start, references = 0, []
        for width, height in sizes:
            pixels = await self._read(start, 3 * width * height)
            references.append(RawImage(width, height, pixels))
            start += len(pixels)
        mask = None
        if mask_size is not None:
            mask = Mask(*mask_size, await self._read(start, math.prod(mask_size)))
        return Edit(tuple(references), mask, result, message["is_black_and_white"] is True)

    async def _write(self, files: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write *files* to shared memory, one behind the other, without holding the event loop."""
        at = 0
        for data in files:
            rest = memoryview(data)
            while rest:
                count = os.pwrite(self.shared.fileno(), rest[:_PIECE_BYTES], at)
                at, rest = at + count, rest[count:]
                await asyncio.sleep(0)

    async def _read(self, start: int, size_bytes: int) -> bytearray:
        """Read shared memory from *start* on, without holding the event loop.

        The decoder shares the file's own offset, and could turn it back. What is returned grows by
        parts: a large one takes milliseconds to be zeroed.
        """
        data, at = bytearray(), 0
        while missing := size_bytes - at:
            data += bytes(min(missing, _PART_BYTES))
            with memoryview(data) as whole:
                while at < len(data):
                    with whole[at : at + _PIECE_BYTES] as piece:
                        count = os.preadv(self.shared.fileno(), [piece], start + at)
                    if not count:
                        raise EOFError
                    at += count
                    await asyncio.sleep(0)
        return data

    async def _send(self, message: object) -> None:
        await asyncio.get_running_loop().sock_sendall(self.connection, pack(message))

    async def _receive_message(self) -> dict[str, Any]:
        length = int.from_bytes(await self._receive(LENGTH_BYTES), "big")
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(length)
        text = await self._receive(length)
        try:
            message = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(message, dict):
            raise ValueError(type(message))
        return message

    async def _receive(self, size_bytes: int) -> bytearray:
        loop = asyncio.get_running_loop()
        data = bytearray(size_bytes)
        rest = memoryview(data)
        while rest:
            # While bytes are there, receiving them gives the event loop no turn.
            await asyncio.sleep(0)
            if not (count := await loop.sock_recv_into(self.connection, rest)):
                raise EOFError
            rest = rest[count:]
        return data


def _sides(said: Any, most_pixels: int) -> Size:
    """Return width and height, of at most *most_pixels*; raises one of `ENDED_EARLY`."""
    width, height = said
    # Neither a fraction nor infinity, which JSON may have, nor a truth value.
    if type(width) is not int or type(height) is not int:
        raise TypeError(type(width), type(height))
    if min(width, height) < 1 or width * height > most_pixels:
        raise ValueError(width, height)
    return width, height


def _reference_sides(said: Any) -> Size:
    """Return the sides of a prepared reference; raises one of `ENDED_EARLY`."""
    sides = _sides(said, REFERENCE_PIXELS)
    if min(sides) < MIN_SIDE or any(side % REFERENCE_MULTIPLE for side in sides):
        raise ValueError(sides)
    return sides


def _texts(said: Any, count: int) -> list[str]:
    """Return *count* texts that UTF-8 can encode; raises one of `ENDED_EARLY`."""
    if type(said) is not list or len(said) != count:
        raise TypeError(type(said))
    for text in said:
        if type(text) is not str:
            raise TypeError(type(text))
        text.encode()  # raises `ValueError` for half of a surrogate pair
    return said
