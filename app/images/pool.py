"""The service's side of the decoders: a place, a decoder, one request, and away with it.

Everything here runs on the event loop and nothing in it waits, neither in a thread nor for a
process. A decoder serves one request. When that has ended, well or not, or when its caller has
gone, the decoder is killed and the fork server puts another in its place, so no place is given on
before the process that held it has ended, and nobody waits for a picture that nobody wants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from app.errors import InvalidRequest, Kind, Unavailable
from app.images.decoder import Limits
from app.images.preparing import Edit, Size, Upload
from app.images.processes import ENDED_EARLY, Decoder, Server

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0


class DecoderPool:
    """Prepares the pictures of *size* requests at a time.

    Made and used on the event loop. `start` and `kill` return at once and may be called again.
    """

    def __init__(self, *, size: int = 2, limits: Limits | None = None) -> None:
        self._size = size
        self._limits = limits or Limits()
        self._places = asyncio.Semaphore(size)
        self._idle: asyncio.Queue[Decoder] = asyncio.Queue()
        self._busy: set[Decoder] = set()
        self._server: Server | None = None
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
            self._server = Server(self._size, self._limits, self._add, self._on_server_lost)
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
                except ENDED_EARLY:
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

    def _add(self, decoder: Decoder) -> None:
        self._retry_s = _FIRST_RETRY_S
        self._is_down = False
        self._idle.put_nowait(decoder)

    async def _take(self) -> Decoder:
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

    def _end(self, decoder: Decoder) -> None:
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


def _unavailable() -> Unavailable:
    return Unavailable(
        "Pictures cannot be decoded at the moment, since there is no process for it; try again in "
        "a few seconds.",
        kind=Kind.WORKER_DOWN,
        retry_after_s=5,
    )
