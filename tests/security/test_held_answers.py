"""What answers keep in memory while they are taken: pieces of what is not read, and no more than a
share of all of it for one client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import socket

import pytest

from app.api.http_limits.connections import ConnectionTable
from app.api.http_limits.held import HeldAnswers
from app.api.http_limits.pacing import Pace
from app.api.pieces import PIECE_BYTES, Body, Data, PieceResponse
from app.request_context import RequestContext, current_request
from tests.api.sockets import listening, until
from tests.security.conftest import guarded

PICTURE_BYTES = 1_000_000


class Taker:
    """A connection as the budget sees it."""

    taken_bytes = 0
    is_open = True

    def abort(self) -> None:
        self.is_open = False


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Budget(HeldAnswers):
    """One of eight megabytes, with everyone who came."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(lambda taker: taker.abort(), max_bytes=8_000_000, clock=self.clock)
        self.takers: list[Taker] = []

    def take(self, client: str, picture: bytes | None = None):
        self.takers.append(Taker())
        pictures = [bytes(PICTURE_BYTES) if picture is None else picture]
        return self.hold(client, self.takers[-1], pictures)

    @property
    def cut(self) -> list[int]:
        return [number for number, taker in enumerate(self.takers) if not taker.is_open]


def test_one_client_keeps_three_quarters_at_most() -> None:
    """Its slowest connection is cut for its newest one."""
    budget = Budget()
    for _ in range(6):
        budget.take("a")
    budget.clock.now = 10.0
    for number, taker in enumerate(budget.takers):
        taker.taken_bytes = 100_000 * abs(number - 2)
    budget.take("a")

    assert budget.cut == [2]
    budget.take("b")
    assert repr(budget) == "<HeldAnswers: 7 of 2 clients, 7000000 bytes>"


def test_over_the_whole_whoever_keeps_most_loses_its_slowest() -> None:
    """Not whoever came last."""
    budget = Budget()
    for client in "aaaabbcc":
        budget.take(client)
    budget.clock.now = 1.0
    budget.takers[0].taken_bytes = budget.takers[1].taken_bytes = PICTURE_BYTES
    budget.take("d")

    assert budget.cut == [2]


def test_what_is_written_counts_no_more() -> None:
    """Nor what has ended, once or twice."""
    budget = Budget()
    first = budget.take("a")
    first.release_body(first.pictures[0])
    second = budget.take("a")
    budget.end(second)
    budget.end(second)
    budget.end(first)

    assert repr(budget) == "<HeldAnswers: 0 of 0 clients, 0 bytes>"


def test_a_picture_that_many_sockets_fetch_counts_once() -> None:
    """Behind a link it is there once, whoever takes it."""
    budget, picture = Budget(), bytes(PICTURE_BYTES)
    holdings = [budget.take("a", picture) for _ in range(100)]

    assert budget.cut == []
    for holding in holdings[1:]:
        budget.end(holding)
    assert repr(budget) == "<HeldAnswers: 1 of 1 clients, 1000000 bytes>"


def test_an_answer_that_is_alone_is_never_cut_for_its_size() -> None:
    """It was allowed to be asked for."""
    budget = Budget()
    budget.take("a", bytes(9_000_000))

    assert budget.cut == []
    budget.take("b")
    assert budget.cut == [0]


@pytest.mark.parametrize(
    ("size_bytes", "taken_bytes", "is_cut"),
    [
        (1_000_000, 480_000, True),
        (1_000_000, 500_000, False),
        (120_000_000, 29_000_000, True),
        (120_000_000, 31_000_000, False),
    ],
)
def test_a_large_answer_must_be_taken_in_two_minutes(size_bytes, taken_bytes, is_cut) -> None:
    """The least rate is 16 KiB/s, or what brings the whole within 120 s."""
    pace = Pace(min_bytes_per_s=16 * 1024, most_s=120, window_s=30)

    assert not pace.is_too_slow(0.0, taken_bytes=0, unsent_bytes=size_bytes)
    left_bytes = size_bytes - taken_bytes
    assert pace.is_too_slow(30.0, taken_bytes=taken_bytes, unsent_bytes=left_bytes) is is_cut


def test_a_body_is_what_its_parts_are_in_small_pieces() -> None:
    """Whatever their sizes, and with its length known before."""
    chance = random.Random(0)
    for _ in range(50):
        parts: list[bytes | Data] = []
        for _ in range(chance.randrange(5)):
            data = chance.randbytes(chance.choice([0, 1, 2, 100, 49_152, 65_536, 200_000]))
            parts.append(data[:100])
            parts.append(Data(data, is_base64=chance.random() < 0.5))
        whole = b"".join(_plain(part) for part in parts)
        body = Body(*parts)
        size_bytes = body.size_bytes
        pieces = [piece for piece, _ in body.pieces()]

        assert b"".join(pieces) == whole
        assert size_bytes == len(whole)
        assert max(map(len, pieces)) <= PIECE_BYTES


def _plain(part: bytes | Data) -> bytes:
    if isinstance(part, bytes):
        return part
    return base64.b64encode(part.data) if part.is_base64 else part.data


class Pictures:
    """ASGI: a picture of its own for each request, of the client that its path names."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("no lifespan")
        current_request.set(RequestContext("r", client=scope["path"]))
        body = Body(b"{", Data(bytes(PICTURE_BYTES), is_base64=True), b"}")
        try:
            await PieceResponse(body, media_type="image/png")(scope, receive, send)
        finally:
            self.ended.append(scope["path"])


def ask(stack: contextlib.ExitStack, port: int, path: str) -> socket.socket:
    """Ask, and take nothing."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    client.setblocking(False)
    return client


async def read_whole(client: socket.socket) -> bytes:
    answer = b""
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            while block := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                answer += block
    return answer


async def test_unread_answers_have_a_limit_together() -> None:
    """Of twenty that one client does not read six are left; each of the others is given up by the
    service, and whoever reads gets all, with the other's sockets still there."""
    app, table = Pictures(), ConnectionTable(held_bytes=8 * PICTURE_BYTES)
    async with listening(app, http=guarded(table=table)) as port:
        with contextlib.ExitStack() as stack:
            held = [ask(stack, port, "/a") for _ in range(20)]
            await until(lambda: len(app.ended) == 14)
            answer = await read_whole(ask(stack, port, "/b"))
            assert "6 of 1 clients, 6000000 bytes" in repr(table.answers)
            for client in held:
                client.close()
        await until(lambda: len(app.ended) == 21)

    assert len(answer.partition(b"\r\n\r\n")[2]) == 2 + (PICTURE_BYTES + 2) // 3 * 4
    assert "0 of 0 clients, 0 bytes" in repr(table.answers)


async def test_a_client_that_has_said_its_last_word_gets_all_of_an_answer() -> None:
    """Half closed in the middle of it, which a client that leaves does not differ from before."""
    app = Pictures()
    async with listening(app, http=guarded()) as port:
        with contextlib.ExitStack() as stack:
            client = ask(stack, port, "/a")
            first = await asyncio.get_running_loop().sock_recv(client, 1000)
            client.shutdown(socket.SHUT_WR)
            answer = first + await read_whole(client)

    assert len(answer.partition(b"\r\n\r\n")[2]) == 2 + (PICTURE_BYTES + 2) // 3 * 4


async def test_the_pieces_of_an_answer_are_the_same_answer(client) -> None:
    """Of ten pictures, whose JSON was never whole in the service."""
    answer = await client.post("/v1/images/generations", json={"prompt": "a", "n": 10})

    assert int(answer.headers["content-length"]) == len(answer.content)
    assert len(json.loads(answer.content)["data"]) == 10
