"""The service's side of the decoders: one decoder per request, killed afterwards.

All of this runs on the event loop, and only `kill`, at the service's end, waits for a process. A
decoder serves one request. When that has ended, in success or failure, or when its client has
disconnected, the decoder is killed and the fork server forks another, so a place is free only once
its process has exited, and nothing waits for an image of a disconnected client. Clients take turns,
so none waits for all the images of another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import Context

from app.errors import InvalidRequest, Kind, Unavailable
from app.images.decoder import Limits
from app.images.preparing import Edit, Size, Upload
from app.images.processes import ENDED_EARLY, Decoder, Server
from app.images.turns import Turns

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_SERVER_START_S = 30.0
"""Until the fork server's first decoder comes: it has low priority, on a busy machine too."""
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0


class DecoderPool:
    """Decodes the images of *size* requests at a time.

    Made and used on the event loop. `start` returns at once, `kill` within milliseconds, or within
    a second where the fork server hangs; both may be called again.
    """

    def __init__(self, *, size: int = 2, limits: Limits | None = None) -> None:
        self._size = size
        self._limits = limits or Limits()
        self._turns = Turns(size)
        self._idle: asyncio.Queue[Decoder | None] = asyncio.Queue()
        """Has one None per place, for requests that still wait when the pool is closed."""
        self._busy: set[Decoder] = set()
        self._server: Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        """Runs until the fork server has sent its first decoder, or until another is started."""
        self._retry_s = _FIRST_RETRY_S
        self._is_down = False
        """Whether a request has waited for a decoder in vain; the next ones fail at once."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<DecoderPool {self._idle.qsize()} idle, {len(self._busy)} busy, {self._server}>"

    def start(self) -> None:
        """Start the processes, unless they exist; they are ready in a moment."""
        if self._server is not None or self._is_closed:
            return
        try:
            self._server = Server(self._size, self._limits, self._add, self._on_server_lost)
        except OSError as error:
            _log.error("The decoders could not be started: %s.", error.strerror)
            self._try_again()
        else:
            self._stop_timer()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_SERVER_START_S, self._replace_server, context=Context())

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: Size | None,
        nearest: Callable[[int, int], Size],
        *,
        client: str,
    ) -> Edit:
        """Call `app.images.preparing.prepare` in a decoder, when it is the turn of *client*.

        Raises:
            InvalidRequest: an image cannot be used, or not within the limits.
            Unavailable: no decoder can be started, or the fork server has exited.
        """
        self.start()
        async with self._turns.of(client):
            for _ in range(_ATTEMPTS):
                decoder = await self._take()
                try:
                    async with asyncio.timeout(self._limits.wall_s):
                        return await decoder.prepare(images, mask, size, nearest)
                except ENDED_EARLY:
                    if self._server is not None:
                        self._server.receive()  # perhaps it ended before, and killed the decoder
                    if self._is_closed or decoder.is_orphan:
                        break  # the image being decoded is not to blame
                    if decoder.began is not None:
                        raise self._beyond_limits(*decoder.began) from None
                    # It had not begun with any image, so none is to blame.
                finally:
                    self._end(decoder)
        raise _unavailable()

    def kill(self) -> None:
        """Kill all processes now; requests that wait for them fail."""
        self._is_closed = True
        self._stop_timer()
        if self._server is not None:
            self._server.end()
            self._release_server()
        for decoder in self._busy:
            decoder.abort()
        for _ in range(self._size):
            self._idle.put_nowait(None)

    def _add(self, decoder: Decoder) -> None:
        self._stop_timer()
        self._retry_s = _FIRST_RETRY_S
        self._is_down = False
        self._idle.put_nowait(decoder)

    async def _take(self) -> Decoder:
        """Wait for a live decoder; one is being forked unless resources are short."""
        if self._is_down or self._is_closed:
            raise _unavailable()
        try:
            async with asyncio.timeout(self._limits.start_s):
                while (decoder := await self._idle.get()) and not decoder.is_alive():
                    decoder.close()
        except TimeoutError:
            self._is_down = True
            if self._timer is None:
                self._replace_server()
            raise _unavailable() from None
        if decoder is None:
            raise _unavailable()
        self._busy.add(decoder)
        return decoder

    def _end(self, decoder: Decoder) -> None:
        self._busy.discard(decoder)
        decoder.close()
        if self._server is not None and not decoder.is_orphan:
            self._server.kill_decoder(decoder.pid)

    def _beyond_limits(self, param: str, code: str) -> InvalidRequest:
        return InvalidRequest(
            f"{param} cannot be decoded within {self._limits.cpu_s:g} s of processor time and "
            f"{self._limits.memory_bytes / 2**30:.2g} GiB of memory, together with what came "
            "before it; save it anew as a plain PNG or baseline JPEG, or scale it down.",
            param=param,
            code=code,
        )

    def _on_server_lost(self) -> None:
        """Start another server."""
        self._release_server()
        _log.error("The decoders' fork server has ended; another is started.")
        self._try_again()

    def _replace_server(self) -> None:
        """Replace a server that forks no decoder: it hangs, or resources are short."""
        if self._server is not None:
            self._server.kill()
            self._release_server()
            _log.error("No decoder comes from their fork server; another is started.")
            self._try_again()

    def _release_server(self) -> None:
        """Drop the server and its idle decoders, which would not be replaced any more."""
        self._server = None
        self._stop_timer()
        for decoder in self._busy:
            decoder.is_orphan = True
        while not self._idle.empty():
            if decoder_left := self._idle.get_nowait():
                decoder_left.close()

    def _retry(self) -> None:
        self._timer = None
        self.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _try_again(self) -> None:
        if not self._is_closed and self._timer is None:
            # Neither the timer nor what it starts is of the request that has found this out.
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._retry_s, self._retry, context=Context())
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)


def _unavailable() -> Unavailable:
    return Unavailable(
        "Pictures cannot be decoded at the moment, since there is no process for it; try again in "
        "a few seconds.",
        kind=Kind.WORKER_DOWN,
        retry_after_s=5,
    )
