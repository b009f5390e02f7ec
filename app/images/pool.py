"""The service's side of the decoders: a place, a decoder, one request, and away with it.

Everything here runs on the event loop and nothing in it waits, neither in a thread nor for a
process. A decoder serves one request. When that has ended, well or not, or when its caller has
gone, the decoder is killed and the fork server puts another in its place, so no place is given on
before the process that held it has ended, and nobody waits for a picture that nobody wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain import Mask, RawImage
from app.errors import InvalidRequest, Kind, Unavailable
from app.images.decoder import LENGTH_BYTES, Limits, pack
from app.images.preparing import Edit, Size, Upload

_log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 65_536
_MAX_PIXELS = 64_000_000
_TURN_BYTES = 2**20
"""Received at a time before others have their turn."""
_ATTEMPTS = 3
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_ENVIRONMENT = ("PATH", "PYTHON", "LD_", "LC_", "LANG", "TZ")
"""How the names begin of what a decoder's process is told: no keys, no tokens."""
_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=268435456"
}
"""A process touches each page of its memory for a first time, which takes ten milliseconds for a
picture of a megapixel: so pages are large where the kernel has them, and freed ones are kept."""
_ENDED_EARLY = (OSError, EOFError, ValueError, LookupError, TypeError)
"""What comes of a decoder that has gone, or talks nonsense, or takes too long."""
_PROGRAM = "import sys; sys.path[:] = sys.argv[5:]; from app.images.forkserver import main; "
_PROGRAM += "main(*sys.argv[1:5])"


class DecoderPool:
    """Prepares the pictures of *size* requests at a time.

    Made and used on the event loop. `start` and `kill` return at once and may be called again.
    """

    def __init__(self, *, size: int = 2, limits: Limits | None = None) -> None:
        self._size = size
        self._limits = limits or Limits()
        self._places = asyncio.Semaphore(size)
        self._idle: asyncio.Queue[_Decoder] = asyncio.Queue()
        self._busy: set[_Decoder] = set()
        self._server: _Server | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = _FIRST_RETRY_S
        self._is_down = False
        """Whether somebody has waited for a decoder in vain; whoever comes next is told at once."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<DecoderPool {self._idle.qsize()} idle, {len(self._busy)} busy, {self._server}>"

    @property
    def server_pid(self) -> int | None:
        """The fork server's process id, None while there is none."""
        return None if self._server is None else self._server.pid

    @property
    def busy_pids(self) -> list[int]:
        """The ids of the decoders that work."""
        return [decoder.pid for decoder in self._busy]

    def start(self) -> None:
        """Start the processes, unless they are there; they will be ready in a moment."""
        if self._server is not None or self._is_closed:
            return
        self._retry = None
        try:
            self._server = _Server(self._size, self._limits, self._add, self._on_server_lost)
        except OSError as error:
            _log.error("The decoders could not be started: %s.", error.strerror)
            self._try_again()

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: Size | None,
        nearest: Callable[[int, int], Size],
    ) -> Edit:
        """Do what `app.images.preparing.prepare` does, in a process with limits.

        Raises:
            InvalidRequest: a picture cannot be used, or not within the limits.
            Unavailable: no decoder can be started.
        """
        self.start()
        async with self._places:
            for _ in range(_ATTEMPTS):
                decoder = await self._take()
                try:
                    async with asyncio.timeout(self._limits.wall_s):
                        return await decoder.prepare(images, mask, size, nearest)
                except _ENDED_EARLY:
                    if self._is_closed:
                        break
                    if decoder.began is not None:
                        raise self._beyond_limits(*decoder.began) from None
                    # It had not looked at any picture, so none is to blame.
                finally:
                    self._end(decoder)
        raise _unavailable()

    def kill(self) -> None:
        """End all processes now; what still waits for them fails."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
        while not self._idle.empty():
            self._idle.get_nowait().close()
        for decoder in tuple(self._busy):
            decoder.hang_up()

    def _add(self, decoder: _Decoder) -> None:
        self._retry_s = _FIRST_RETRY_S
        self._is_down = False
        self._idle.put_nowait(decoder)

    async def _take(self) -> _Decoder:
        """Wait for a decoder that lives; one is on its way unless the machine has no room."""
        if self._is_down:
            raise _unavailable()
        try:
            async with asyncio.timeout(self._limits.start_s):
                while not (decoder := await self._idle.get()).is_alive():
                    decoder.close()
        except TimeoutError:
            self._is_down = True
            raise _unavailable() from None
        self._busy.add(decoder)
        return decoder

    def _end(self, decoder: _Decoder) -> None:
        self._busy.discard(decoder)
        decoder.close()
        if self._server is not None:
            self._server.kill(decoder.pid)

    def _beyond_limits(self, param: str, code: str) -> InvalidRequest:
        return InvalidRequest(
            f"{param} cannot be decoded within {self._limits.cpu_s:g} s of processor time and "
            f"{self._limits.memory_bytes / 2**30:.2g} GiB of memory, together with what came "
            "before it; save it anew as a plain PNG or baseline JPEG, or scale it down.",
            param=param,
            code=code,
        )

    def _on_server_lost(self) -> None:
        """Start another; what is idle would not be replaced any more."""
        self._server = None
        while not self._idle.empty():
            self._idle.get_nowait().close()
        _log.error("The decoders' fork server has ended; another is started.")
        self._try_again()

    def _try_again(self) -> None:
        if not self._is_closed and self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self._retry_s, self.start)
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


class _Server:
    """The fork server as its parent sees it. Raises `OSError` where there is no room for it."""

    def __init__(
        self,
        size: int,
        limits: Limits,
        on_decoder: Callable[[_Decoder], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_decoder = on_decoder
        self._on_lost = on_lost
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    _command(theirs, size, limits),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError:
                self._control.close()
                raise
        self._control.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._control, self._receive)

    def __repr__(self) -> str:
        return f"<fork server {self.pid}>"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def kill(self, pid: int) -> None:
        """Have the decoder *pid* killed; one that has ended is none any more."""
        with contextlib.suppress(OSError):
            self._control.send(b"%d" % pid)

    def close(self) -> None:
        """End it, with the decoders; takes milliseconds."""
        self._loop.remove_reader(self._control)
        self._control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if message and descriptors:
            self._on_decoder(_Decoder(int(message), socket.socket(fileno=descriptors[0])))
            return
        self.close()
        self._on_lost()


@dataclass(eq=False, slots=True)
class _Decoder:
    """One decoder as its user sees it."""

    pid: int
    connection: socket.socket
    began: tuple[str, str] | None = None
    """Param and code of the file that it was at last; None before the first."""

    def __post_init__(self) -> None:
        self.connection.setblocking(False)

    def is_alive(self) -> bool:
        """Tell whether it is there; it says nothing before it is asked."""
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def hang_up(self) -> None:
        """End the connection under whoever uses it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it."""
        self.connection.close()

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: Size | None,
        nearest: Callable[[int, int], Size],
    ) -> Edit:
        """Send the files and receive what became of them.

        Raises:
            _ENDED_EARLY: the process has gone, or talks nonsense.
            InvalidRequest: as it says.
        """
        described = {"images": [_describe(each) for each in images], "size": size}
        await self._send(pack(described | {"mask": mask and _describe(mask)}))
        for upload in (*images, *([mask] if mask else [])):
            await self._send(upload.content)
        while True:
            message = await self._read()
            if "begin" in message:
                self.began = (str(message["begin"][0]), str(message["begin"][1]))
            elif "nearest" in message:
                await self._send(pack(nearest(*_size(message["nearest"]))))
            elif "refused" in message:
                text, param, code = message["refused"]
                raise InvalidRequest(text, param=param, code=code)
            else:
                return await self._receive_edit(message)

    async def _receive_edit(self, message: dict[str, Any]) -> Edit:
        references = []
        for width, height in map(_size, message["references"]):
            references.append(RawImage(width, height, await self._receive(3 * width * height)))
        mask = None
        if message["mask"] is not None:
            width, height = _size(message["mask"])
            mask = Mask(width, height, await self._receive(width * height))
        return Edit(tuple(references), mask, _size(message["size"]))

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def _read(self) -> dict[str, Any]:
        length = int.from_bytes(await self._receive(LENGTH_BYTES), "big")
        if length > _MAX_MESSAGE_BYTES:
            raise ValueError(length)
        message = json.loads(await self._receive(length))
        if not isinstance(message, dict):
            raise ValueError(type(message))
        return message

    async def _receive(self, size_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray(size_bytes)
        view, at, turn = memoryview(data), 0, 0
        while at < size_bytes:
            count = await loop.sock_recv_into(self.connection, view[at:])
            if count == 0:
                raise EOFError
            at += count
            turn += count
            if turn > _TURN_BYTES:  # data that is there already comes without a turn for others
                await asyncio.sleep(0)
                turn = 0
        return bytes(data)


def _command(control: socket.socket, size: int, limits: Limits) -> list[str]:
    numbers = (control.fileno(), size, limits.cpu_s, limits.memory_bytes)
    # With this process's own path, as a spawned one would have, and never the current folder's.
    return [sys.executable, "-P", "-c", _PROGRAM, *map(str, numbers), *sys.path]


def _environment() -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name.startswith(_ENVIRONMENT)}
    return kept | _MEMORY


def _unavailable() -> Unavailable:
    return Unavailable(
        "Pictures cannot be decoded at the moment, since there is no process for it; try again in "
        "a few seconds.",
        kind=Kind.WORKER_DOWN,
        retry_after_s=5,
    )


def _describe(upload: Upload) -> list[object]:
    return [len(upload.content), upload.is_base64, upload.param]


def _size(sides: Any) -> Size:
    width, height = map(int, sides)
    if min(width, height) < 1 or width * height > _MAX_PIXELS:
        raise ValueError(sides)
    return width, height
