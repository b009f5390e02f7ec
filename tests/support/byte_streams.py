"""A fuzzer of what may come on a connection: a grammar of HTTP/1 with mutations, from a seed.

What is answered is nobody's business here: half of it is no HTTP. `fuzz` only finds what everybody
else notices: how late the service's event loop was (its own gauge, `klein_event_loop_lag_seconds`,
read twice a second), how much memory it took, which descriptors it keeps, and whether it serves
the next honest request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path

import psutil

from tests.support.server import Server

AT_ONCE = 24
HELD = 48
"""Connections whose answers are never read, kept open until as many new ones have come."""
PATIENCE_S = 0.05
MAX_STREAM_BYTES = 500_000

PATHS = (
    b"/health/live", b"/health", b"/metrics", b"/", b"/docs", b"/openapi.json", b"/nowhere",
    b"/generate", b"/v1/images/generations", b"/v1/images/edits", b"/static/playground.js",
    b"/%00", b"//", b"/?" + b"a=b&" * 50, b"*", b"http://localhost/health/live", b"/..%2f..", b"",
)  # fmt: skip
METHODS = (b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"CONNECT", b"PRI", b"get", b"")
VERSIONS = (b"HTTP/1.1",) * 9 + (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.11", b"")
LINE_ENDS = (b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n", b"\r\n ")
CODINGS = (
    b"chunked", b"gzip, chunked", b"chunked, chunked", b"identity", b"Chunked ", b"xchunked", b"",
)  # fmt: skip
UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAA\r\n",
    b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n",
)
BODIES = (
    b"", b"{", b"{}", b'{"prompt": ""}', b'{"prompt": "x", "width": 128, "height": 128}',
    b"[" * 5000,
    b'{"prompt": "x", "n": 3, "size": "9x9"}', b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n\r\n" * 2000, b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n",
    b"0\r\n\r\n", b"\xff" * 3000, b"a" * 200_000,
)  # fmt: skip
TYPES = (b"application/json", b"multipart/form-data; boundary=x", b"text/plain", b"")
ODD_BYTES = (b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\xff", b"\r\n\r\n", b"ffffffffffffffff")


class End(Enum):
    """How a client leaves."""

    READ = "reads what comes"
    HALF_CLOSE = "says that it sends no more, and reads"
    CLOSE = "closes"
    RESET = "resets the connection"
    HOLD = "reads nothing and stays"


@dataclass(frozen=True)
class Talk:
    """What one client does."""

    segments: tuple[bytes, ...]
    end: End


def talks(seed: int, count: int) -> Iterator[Talk]:
    """*count* clients; the same ones for the same seed."""
    chance = random.Random(seed)
    for _ in range(count):
        yield Talk(tuple(_segments(chance, _stream(chance))), chance.choice(tuple(End)))


def _stream(chance: random.Random) -> bytes:
    """Some messages behind one another, most of them a little wrong."""
    messages = [_message(chance) for _ in range(chance.choice((1, 1, 1, 2, 3, 20)))]
    if chance.random() < 0.05:
        messages *= 100
    stream = b"".join(messages)[:MAX_STREAM_BYTES]
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 5))):
        stream = _mutated(chance, stream)
    return stream


def _message(chance: random.Random) -> bytes:
    first = [chance.choice(METHODS[:2]), chance.choice(PATHS[:11]), b"HTTP/1.1"]
    if chance.random() < 0.3:
        first = [chance.choice(METHODS), chance.choice(PATHS), chance.choice(VERSIONS)]
    lines = [b" ".join(first), b"Host: localhost"]
    lines += [line for line in _headers(chance) if chance.random() < 0.5]
    head = b"\r\n".join(lines) + b"\r\n"
    if chance.random() < 0.2:
        head += chance.choice(UPGRADES)
    body = chance.choice(BODIES)
    framing = chance.random()
    if framing < 0.3:
        return head + b"\r\n"
    if framing < 0.6:
        wrong = chance.choice((0, 0, 0, 0, 1, -1, 1000, 10**9, 10**20))
        return head + b"Content-Length: %d\r\n\r\n" % max(0, len(body) + wrong) + body
    if framing < 0.9:
        coding = b"chunked" if chance.random() < 0.8 else chance.choice(CODINGS)
        return head + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + _chunks(chance, body)
    both = [b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n"] * 2
    chance.shuffle(both)
    return head + b"".join(both[: chance.randint(2, 3)]) + b"\r\n" + _chunks(chance, body)


def _headers(chance: random.Random) -> list[bytes]:
    return [
        b"Content-Type: " + chance.choice(TYPES),
        b"Connection: " + chance.choice((b"close", b"keep-alive", b"close, Upgrade", b"")),
        b"Expect: 100-continue",
        b"x: " + b"a" * chance.choice((0, 10, 5000, 70_000)),
        b"".join(b"h%d: v\r\n" % i for i in range(chance.choice((1, 50, 300)))).rstrip(),
        chance.choice((b": empty", b"no colon", b" folded: x", b"sp ace: x", b"\xe9: \xe9", b"e:")),
    ]


def _chunks(chance: random.Random, body: bytes) -> bytes:
    size = chance.choice((1, 7, 1000, 100_000)) if len(body) < 10_000 else 5000
    extension = chance.choice((b"", b"", b"", b";a=b", b";" + b"x" * 3000, b' ; q="\\"'))
    extension = extension if size > 7 else extension[:4]
    parts = [
        b"%x%s\r\n%s\r\n" % (len(piece), extension, piece)
        for piece in (body[at : at + size] for at in range(0, len(body), size))
    ]
    trailers = chance.choice(
        (b"", b"", b"A: b\r\n", b"Content-Length: 3\r\nHost: x\r\n", b"bad\r\n")
    )
    last = chance.choice((b"0", b"0", b"0", b"00", b"-1", b"g", b"fffffffffffffffff", b""))
    return b"".join(parts) + last + b"\r\n" + trailers + b"\r\n"


def _mutated(chance: random.Random, stream: bytes) -> bytes:
    at = chance.randrange(len(stream) + 1)
    until = min(len(stream), at + chance.choice((1, 2, 10, 500)))
    kind = chance.randrange(6)
    if kind == 0:
        return stream[:at] + chance.choice(ODD_BYTES) + stream[at:]
    if kind == 1:
        return stream[:at] + stream[until:]
    if kind == 2:
        return stream[:until] + stream[at:]
    if kind == 3:
        return stream.replace(b"\r\n", chance.choice(LINE_ENDS), chance.choice((1, 2, -1)))
    if kind == 4:
        return stream[:at] + bytes([chance.randrange(256)]) + stream[at + 1 :]
    return stream[:at]


def _segments(chance: random.Random, stream: bytes) -> list[bytes]:
    """Split, or not; some segments twice, some in the wrong order."""
    cuts = sorted(chance.randrange(len(stream) + 1) for _ in range(chance.choice((0, 0, 1, 3, 12))))
    edges = [0, *cuts, len(stream)]
    segments = [stream[a:b] for a, b in pairwise(edges)]
    if chance.random() < 0.05:
        segments.insert(chance.randrange(len(segments)), chance.choice(segments))
    if chance.random() < 0.05:
        chance.shuffle(segments)
    return segments


@dataclass
class Found:
    """What everybody else notices."""

    connections: int
    lag_s: float
    rss_growth_bytes: int
    peak_growth_bytes: int
    descriptors: tuple[int, int]
    """Before and after."""
    is_served: bool
    seconds: float


async def fuzz(server: Server, *, seed: int, count: int, port: int) -> Found:
    """Let *count* clients loose on *server*."""
    process = psutil.Process(server.process.pid)
    await _honest(port)
    # Made at the first request, in a tenth of a second.
    await asyncio.to_thread(server.get, "/openapi.json")
    await asyncio.to_thread(server.metric, "klein_event_loop_lag_seconds")
    descriptors = await _steady_descriptors(process)
    before = descriptors, process.memory_info().rss, _peak_bytes(process.pid)
    started = time.monotonic()
    crowd = _Crowd(port, talks(seed, count))
    lags = [0.0]
    watching = asyncio.create_task(_watch(server, lags))
    await asyncio.gather(*(crowd.run() for _ in range(AT_ONCE)))
    took_s = time.monotonic() - started
    crowd.leave()
    is_served = await _honest(port)
    watching.cancel()
    lags.append(await asyncio.to_thread(server.metric, "klein_event_loop_lag_seconds"))
    return Found(
        connections=count,
        lag_s=max(lags),
        rss_growth_bytes=process.memory_info().rss - before[1],
        peak_growth_bytes=_peak_bytes(process.pid) - before[2],
        descriptors=(before[0], await _settled_descriptors(process, before[0])),
        is_served=is_served,
        seconds=took_s,
    )


@dataclass
class _Crowd:
    """Clients that share one list of talks."""

    port: int
    talks: Iterator[Talk]
    held: list[socket.socket] = field(default_factory=list)

    async def run(self) -> None:
        for talk in self.talks:
            with socket.socket() as client, contextlib.suppress(OSError, TimeoutError):
                client.setblocking(False)
                await asyncio.wait_for(self._talk(client, talk), 2.0)

    def leave(self) -> None:
        while self.held:
            self.held.pop().close()

    async def _talk(self, client: socket.socket, talk: Talk) -> None:
        loop = asyncio.get_running_loop()
        if talk.end is End.HOLD:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(client, ("127.0.0.1", self.port))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for segment in talk.segments:
            # What the service does not want to read any more is not pressed on it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(loop.sock_sendall(client, segment), 0.2)
            await asyncio.sleep(0)
        if talk.end is End.HOLD:
            self._hold(client)
            return
        if talk.end is End.RESET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if talk.end is End.HALF_CLOSE:
            client.shutdown(socket.SHUT_WR)
        if talk.end in {End.HALF_CLOSE, End.READ}:
            with contextlib.suppress(TimeoutError):
                while await asyncio.wait_for(loop.sock_recv(client, 1 << 18), PATIENCE_S):
                    pass

    def _hold(self, client: socket.socket) -> None:
        self.held.append(socket.socket(fileno=client.detach()))
        if len(self.held) > HELD:
            self.held.pop(0).close()


async def _watch(server: Server, lags: list[float]) -> None:
    while True:
        await asyncio.sleep(0.5)
        with contextlib.suppress(OSError):
            lag_s = await asyncio.to_thread(server.metric, "klein_event_loop_lag_seconds")
            lags.append(lag_s)


async def _honest(port: int) -> bool:
    """Whether a picture is made for whoever asks as one should, within ten seconds."""
    body = json.dumps({"prompt": "honest", "width": 128, "height": 128}).encode()
    head = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(head % len(body) + body)
            answer = await reader.read()
    return answer.startswith(b"HTTP/1.1 200 ")


async def _steady_descriptors(process: psutil.Process) -> int:
    """Return how many there are once they have not changed for a second: the decoders, each of
    which has a connection, start beside the model.
    """
    seen: list[int] = []
    while len(seen) < 10 or len(set(seen[-10:])) > 1:
        seen.append(process.num_fds())
        await asyncio.sleep(0.1)
    return seen[-1]


async def _settled_descriptors(process: psutil.Process, wanted: int) -> int:
    """How many there are once they are down to *wanted*, or after ten seconds."""
    until = time.monotonic() + 10
    # Another process's descriptors: there is no event to wait for.
    while process.num_fds() > wanted and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return process.num_fds()


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
