"""Streams that outlive their sockets, so that a page that was reloaded finds its picture again.

A request's `Idempotency-Key` names its stream, for its client alone. The events are recorded as
they come; whoever asks again with the same key and the same body gets all of them and then those
that follow. A stream that nobody reads is let go `LIFETIME_S` after its last reader has left: its
job is cancelled. One that has ended is let go as long after its end, or earlier to make room, once
somebody has read it to its end.

Room is taken for the largest files that the job could make, before it is queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial

from app.api.openai.stream_key import KEY
from app.api.pieces import Body
from app.domain import ImageSpec
from app.errors import InvalidRequest, Kind, Unavailable
from app.limits import PREVIEW_SIDE, three_quarters
from app.request_context import RequestContext, current_request
from app.service.ticket import Ticket

LIFETIME_S = 60.0
MAX_STREAMS = 4
"""Of one client."""
MAX_READERS = 4
"""Of one stream at a time."""
MAX_BYTES = 64 * 1024 * 1024
"""Of all events together; one client has three quarters while another has any."""

_TEXT_BYTES = 1024 * 1024
"""For texts: of the events, and in the file's metadata the prompt twice."""
_RETRY_S = 5

_Events = AsyncGenerator[bytes | Body, None]


@dataclass(eq=False)
class KeptStream:
    """The events of one job so far, and who reads them; made by `KeptStreams`."""

    client: str
    key: str
    digest: bytes = field(repr=False)
    """Of the request's body."""
    ticket: Ticket | None = field(repr=False)
    """None once it has ended: it holds pixels."""
    headers: Mapping[str, str]
    context: RequestContext = field(repr=False)
    """What the job leaves for the log line of a request, instead of the one that began it."""
    room_bytes: int
    """The most that the events may take; once they are complete, what they take."""
    readers: int = 0
    has_ended: bool = False
    was_read: bool = False
    """Whether somebody has read it to its end."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    _events: list[bytes | Body] = field(default_factory=list, repr=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def makes_way(self) -> bool:
        """Whether nobody misses it: it has ended, and was read, or has no picture."""
        is_needless = self.was_read or self.context.error is not None
        return self.has_ended and not self.readers and is_needless

    def check(self, digest: bytes) -> None:
        """Refuse a request for it whose body has another *digest*.

        Raises:
            InvalidRequest: it has.
        """
        if self.digest != digest:
            raise InvalidRequest(
                f"This {KEY} was sent with another body before; choose a new key for each picture.",
                param=KEY,
                code="idempotency_key_reused",
            )

    async def record(self, events: _Events) -> None:
        """Keep *events* until the last one."""
        held_bytes = 0
        try:
            async for event in events:
                held_bytes += event.held_bytes if isinstance(event, Body) else len(event)
                self._events.append(event)
                self._wake()
        finally:
            self.room_bytes, self.ticket = held_bytes, None
            self.has_ended = True
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self) -> _Events:
        """Yield all events from the first one on, each as soon as it is there."""
        at = 0
        while True:
            changed = self._changed
            while at < len(self._events):
                event = self._events[at]
                at += 1
                yield event.copy() if isinstance(event, Body) else event
            if self.has_ended and at == len(self._events):
                break
            await changed.wait()
        self._tell(current_request.get())

    def _tell(self, context: RequestContext) -> None:
        """Leave what the job was for the log line of the request that has read it to its end."""
        context.error = self.context.error
        if not self.was_read:
            self.was_read = True
            context.notes.update(self.context.notes)


class KeptStreams:
    """The streams that are kept; used from the event loop's thread only."""

    def __init__(self, *, lifetime_s: float = LIFETIME_S, max_bytes: int = MAX_BYTES) -> None:
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes
        self._of: dict[tuple[str, str], KeptStream] = {}
        """Those that can be asked for, by client and key, the oldest first."""
        self._held: dict[KeptStream, None] = {}
        """All whose events are in memory: of these some are only read to their end."""
        self._recording: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<KeptStreams: {len(self._held)}, {self._held_bytes()} bytes>"

    def join(self, client: str, key: str) -> KeptStream | None:
        """Count one reader more of the stream of *client* under *key*; None where there is none.

        It must `leave`.

        Raises:
            Unavailable: it has as many readers as it may have.
        """
        stream = self._of.get((client, key))
        if stream is None:
            return None
        if stream.readers >= MAX_READERS:
            raise Unavailable.because(
                f"At most {MAX_READERS} connections may read the stream of one {KEY}; "
                "close one of them",
                Kind.QUEUE_FULL,
                _RETRY_S,
            )
        stream.readers += 1
        if not stream.has_ended:
            self._stop_timer(stream)
        return stream

    def leave(self, stream: KeptStream) -> None:
        """Count one reader less; without any, a running stream is let go after a while."""
        stream.readers -= 1
        if stream.readers:
            return
        if self._of.get((stream.client, stream.key)) is not stream:
            self._held.pop(stream, None)
        elif not stream.has_ended:
            self._start_timer(stream)

    def make_room(self, client: str, *specs: ImageSpec) -> int:
        """Return the bytes that the events of *specs* may take, once there is room for them.

        Streams that nobody misses make way, the oldest first.

        Raises:
            InvalidRequest: several images are more than one client may ever keep beside another.
            Unavailable: *client* has as many streams as it may have, or there is no room.
        """
        room_bytes = sum(map(_room_bytes, specs))
        most = three_quarters(self._max_bytes)
        if len(specs) > 1 and room_bytes > most:
            raise InvalidRequest(
                f"{len(specs)} pictures of this size are more than a stream with an {KEY} may "
                f"hold; ask for at most {max(1, most * len(specs) // room_bytes)} at a time, or "
                "without the header.",
                param="n",
            )
        while error := self._refusal(client, room_bytes):
            old = (each for each in self._of.values() if each.makes_way)
            if self._count(client) >= MAX_STREAMS:
                old = (each for each in old if each.client == client)
            if (oldest := next(old, None)) is None:
                raise error
            self._let_go(oldest)
        return room_bytes

    def keep(
        self,
        key: str,
        digest: bytes,
        ticket: Ticket,
        events: _Events,
        *,
        headers: Mapping[str, str],
        room_bytes: int,
    ) -> KeptStream:
        """Keep the *events* of *ticket*, for which `make_room` has found *room_bytes*.

        The stream has one reader, which must `leave`.
        """
        asked = current_request.get()
        context = RequestContext(asked.id, asked.client, asked.has_key, trace=asked.trace)
        stream = KeptStream(asked.client, key, digest, ticket, headers, context, room_bytes, 1)
        self._of[stream.client, key] = stream
        self._held[stream] = None
        variables = copy_context()
        variables.run(current_request.set, context)
        recording = asyncio.create_task(
            stream.record(events), name=f"stream {ticket.id}", context=variables
        )
        self._recording.add(recording)
        recording.add_done_callback(partial(self._on_end, stream))
        return stream

    async def close(self) -> None:
        """Cancel the jobs that run, and forget everything."""
        for stream in tuple(self._held):
            self._let_go(stream)
        if self._recording:
            await asyncio.wait(self._recording)

    def _on_end(self, stream: KeptStream, recording: asyncio.Task[None]) -> None:
        self._recording.discard(recording)
        if stream in self._held:
            self._start_timer(stream)

    def _start_timer(self, stream: KeptStream) -> None:
        self._stop_timer(stream)
        loop = asyncio.get_running_loop()
        stream.timer = loop.call_later(self._lifetime_s, self._let_go, stream)

    def _stop_timer(self, stream: KeptStream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None

    def _let_go(self, stream: KeptStream) -> None:
        """Cancel the job, if it runs; forget the events, once nobody reads them."""
        self._stop_timer(stream)
        if stream.ticket is not None:
            stream.ticket.cancel()
        self._of.pop((stream.client, stream.key), None)
        if not stream.readers:
            self._held.pop(stream, None)

    def _refusal(self, client: str, room_bytes: int) -> Unavailable | None:
        """Return why a stream more of *client* cannot be kept now; None where it can."""
        if self._count(client) >= MAX_STREAMS:
            return Unavailable.because(
                f"At most {MAX_STREAMS} streams with an {KEY} are kept for one client; "
                "read one of yours to its end, or ask without the header",
                Kind.QUEUE_FULL,
                _RETRY_S,
            )
        own = self._held_bytes(client)
        has_others = any(each.client != client for each in self._held)
        most = three_quarters(self._max_bytes) if own and has_others else self._max_bytes
        if own + room_bytes <= most and self._held_bytes() + room_bytes <= self._max_bytes:
            return None
        return Unavailable.because(
            f"There is no room to keep one more stream with an {KEY}; ask without the header, or "
            "for a smaller size",
            Kind.QUEUE_FULL,
            _RETRY_S,
        )

    def _count(self, client: str) -> int:
        return sum(each.client == client for each in self._of.values())

    def _held_bytes(self, client: str | None = None) -> int:
        held = (each for each in self._held if client in {None, each.client})
        return sum(each.room_bytes for each in held)


def _room_bytes(spec: ImageSpec) -> int:
    """Return the most that the files of *spec* take: three bytes for each pixel, and the texts."""
    width, height = spec.output_size
    preview = width * height if spec.scaled_to else min(spec.pixels, PREVIEW_SIDE**2)
    return 3 * (width * height + spec.previews * preview) + _TEXT_BYTES
