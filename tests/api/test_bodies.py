"""What all bodies that are being read may hold together, and each client's share of it."""

from __future__ import annotations

import asyncio

import pytest

from app.api.middleware.body_limit import BODIES_AT_ONCE, SMALL_BYTES, BodyLimit, is_large
from app.errors import Kind, Unavailable
from app.request_context import RequestContext, current_request

LARGEST = 400_000
WHOLE = BODIES_AT_ONCE * LARGEST


class Reading:
    """One request whose body is read bit by bit, as the test says."""

    def __init__(self, limit: BodyLimit, client: str) -> None:
        self.context = RequestContext("req", client=client)
        current_request.set(self.context)
        self._messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self._is_read = asyncio.Event()
        self._task = asyncio.create_task(
            limit({"type": "http", "headers": []}, self._receive, None)
        )

    async def read(self, size: int) -> None:
        """Let *size* bytes come and be read; raises what the reader gets."""
        self._is_read.clear()
        self._messages.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": True})
        asked = asyncio.create_task(self._is_read.wait())
        await asyncio.wait([self._task, asked], return_when=asyncio.FIRST_COMPLETED, timeout=5)
        asked.cancel()
        if self._task.done():
            self._task.result()

    async def _receive(self) -> dict[str, object]:
        """Asked for more, the reader has taken all that came before."""
        if self._messages.empty():
            self._is_read.set()
        return await self._messages.get()

    async def end(self) -> None:
        """The request ends."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def read_on(scope, receive, send):
    """A route that reads for as long as something comes."""
    while True:
        await receive()


@pytest.fixture
async def start():
    """Requests of clients: `start("a")` reads under one limit for all of the test's."""
    limit = BodyLimit(read_on, max_bytes=LARGEST, limit_s=60)
    readings = []

    def begin(client: str) -> Reading:
        readings.append(Reading(limit, client))
        return readings[-1]

    yield begin
    for each in readings:
        await each.end()


async def hold(start, client: str, size: int) -> list[Reading]:
    """Let *client* hold *size* bytes in as few bodies as may be."""
    found = []
    while size:
        found.append(start(client))
        await found[-1].read(min(size, LARGEST))
        size -= min(size, LARGEST)
    return found


async def refusal(reading: Reading, size: int) -> Unavailable:
    """Read and be refused."""
    with pytest.raises(Unavailable) as refused:
        await reading.read(size)
    return refused.value


async def test_one_client_leaves_a_quarter_to_the_others(start):
    """Three quarters of the budget are the most, and the next client finds room at once."""
    await hold(start, "a", WHOLE * 3 // 4)
    refused = await refusal(start("a"), LARGEST // 2)

    assert (refused.kind, refused.retry_after_s) == (Kind.QUEUE_FULL, 5)
    assert "your own" in refused.message
    await start("b").read(LARGEST)


async def test_all_together_have_a_limit_too(start):
    """However many clients there are."""
    for client in "abcdefgh":
        await hold(start, client, LARGEST)

    assert "Too many large" in (await refusal(start("i"), SMALL_BYTES + 1)).message


async def test_a_small_body_is_always_admitted(start):
    """Whatever the budget: from another client, and from the one that used it up."""
    await hold(start, "a", WHOLE * 3 // 4)
    await hold(start, "b", WHOLE // 4)
    for client in ("a", "b", "c"):
        reading = start(client)
        await reading.read(SMALL_BYTES - 1)
        await reading.read(1)


async def test_the_share_is_given_back_once_the_body_was_read(start):
    """By the route, while the request itself goes on; what comes after it counts anew."""
    first, *_ = await hold(start, "a", WHOLE * 3 // 4)
    first.context.release_body()
    first.context.release_body()

    await start("a").read(LARGEST)
    await refusal(start("a"), LARGEST // 2)


async def test_the_share_is_given_back_by_whoever_goes(start):
    """Refused, gone or answered: nothing stays counted."""
    held = await hold(start, "a", WHOLE * 3 // 4)
    await refusal(start("a"), LARGEST)
    for each in held:
        await each.end()

    await hold(start, "a", WHOLE * 3 // 4)


@pytest.mark.parametrize(
    ("length", "is_one"),
    [
        ("0", False),
        (str(SMALL_BYTES), False),
        (f"{SMALL_BYTES:030}", False),
        (str(SMALL_BYTES + 1), True),
        (f"{SMALL_BYTES + 1:030}", True),
        (f"{2**64 - 1}", True),
        ("9" * 40, True),
    ],
)
def test_a_length_is_read_whatever_its_digits(length: str, is_one: bool) -> None:
    """With leading zeros, or more digits than any body has bytes."""
    scope = {"type": "http", "headers": [(b"content-length", length.encode())]}

    assert is_large(scope) is is_one
