"""Clients that misbehave, and services that are ended at the wrong moment: for the tests and for
`make soak`.

Requests are written by hand on sockets of their own, because what matters here is how a connection
ends, which HTTP clients smooth over, and because thousands of them must cost little.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from dataclasses import dataclass, field

from tests.support.server import Server

LOST = "lost"
GONE = "gone away"
REFUSED = "not accepted"

CLOSING_S = 5.0
"""How long a service may take to end once it has closed its port."""


@dataclass(frozen=True)
class Answer:
    """How one request ended: a status, or one of the words above; *code* is the error's."""

    status: int | str
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def request_bytes(path: str, body: object, method: str = "POST") -> bytes:
    """One whole request with a JSON body, or with *body* as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


async def ask(
    port: int, data: bytes, *, leave_after_s: float | None = None, limit_s: float = 120.0
) -> Answer:
    """Send *data* and read the whole answer; with *leave_after_s*, hang up before it."""
    started = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Answer(REFUSED)
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(limit_s if leave_after_s is None else leave_after_s):
            answer = await reader.read()
    except TimeoutError:
        return Answer(LOST if leave_after_s is None else GONE)
    except OSError:
        return Answer(LOST)
    finally:
        writer.transport.abort()
    return _read(answer, time.monotonic() - started)


def _read(answer: bytes, seconds: float) -> Answer:
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return Answer(LOST)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    length = headers.get("content-length")
    if length is not None and len(body) != int(length):
        return Answer(LOST)
    code = ""
    if (status := int(first.split()[1])) >= 400:
        code = json.loads(body)["error"]["code"]
    return Answer(status, code, headers, seconds)


def port_of(server: Server) -> int:
    """The port on which *server* listens."""
    return int(server.url.rpartition(":")[2])


@dataclass(frozen=True)
class Drained:
    """What became of the requests around one SIGTERM."""

    answers: list[Answer]
    exit_code: int

    @property
    def lost(self) -> int:
        """Requests without a whole answer, and jobs that were accepted and not finished."""
        fine = {(200, ""), (503, "shutting_down"), (503, "server_is_overloaded"), (REFUSED, "")}
        return sum((answer.status, answer.code) not in fine for answer in self.answers)


async def drain_at(server: Server, moment_s: float, *, requests: int = 6) -> Drained:
    """Send *requests* over a quarter of a second, SIGTERM after *moment_s*, and wait for all."""
    port = port_of(server)
    body = request_bytes("/generate", {"prompt": "x", "width": 128, "height": 128})

    async def later(delay_s: float) -> tuple[Answer, float]:
        await asyncio.sleep(delay_s)
        return await ask(port, body), time.monotonic()

    async def stop() -> None:
        await asyncio.sleep(moment_s)
        server.process.send_signal(signal.SIGTERM)

    delays = [0.25 * number / requests for number in range(requests)]
    stopping = asyncio.create_task(stop())
    found = await asyncio.gather(*(later(delay_s) for delay_s in delays))
    await stopping
    exit_code = await asyncio.to_thread(server.wait)
    idle = max((ended for answer, ended in found if answer.status == 200), default=0.0)
    closed = max(idle, time.monotonic() - CLOSING_S)
    answers = [
        # What came while the port was being closed, after the last accepted job had ended, is cut
        # off; the process takes a moment longer.
        Answer(REFUSED)
        if answer.status == LOST and delay_s > moment_s and ended > closed
        else answer
        for delay_s, (answer, ended) in zip(delays, found, strict=True)
    ]
    return Drained(answers, exit_code)


async def drain_often(times: int, *, seed: int, device: str = "cpu") -> list[Drained]:
    """Drain *times* services, one after the other, each at a random moment."""
    chance = random.Random(seed)
    found = []
    for _ in range(times):
        server = Server(
            "slow=0.06", module="tests.support.scripted_engine", model="shapes", device=device
        )
        try:
            await asyncio.to_thread(server.wait_until_ready)
            found.append(await drain_at(server, chance.uniform(0.0, 0.5)))
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.wait()
    return found
