"""Odd request lines over a real socket: HEAD, HTTP/1.0, slashes too many."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from tests.api.apps import app_on
from tests.api.sockets import listening
from tests.security.conftest import guarded
from tests.support.fakes import FakeRuntime

LAST = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture
async def ask(runtime: FakeRuntime):
    """Send bytes as they are to an app on fakes, behind our own protocol; returns all that comes
    back.
    """
    async with listening(app_on(runtime), http=guarded()) as port:

        async def send(*messages: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(b"".join(messages))
                async with asyncio.timeout(10):
                    return await reader.read()

        yield send


def post(path: bytes, body: dict[str, object]) -> bytes:
    """A request that closes its connection."""
    data = json.dumps(body).encode()
    return (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (path, len(data), data)
    )


def head(path: bytes) -> bytes:
    """A request that leaves its connection open."""
    return b"HEAD %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path


def statuses(answer: bytes) -> list[bytes]:
    """The status of each answer in *answer*."""
    return [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


async def test_nothing_stands_behind_the_head_of_a_head(ask) -> None:
    """A body there would be taken for the next answer on the same connection."""
    for path in (b"/health", b"/v1/models", b"/metrics", b"/", b"/nope"):
        answer = await ask(head(path), LAST)
        first, _, rest = answer.partition(b"\r\n\r\n")

        assert b"content-length: 0" not in first
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n")
        assert statuses(answer) == [b"404" if path == b"/nope" else b"200", b"200"]


async def test_head_of_a_picture_sends_none_of_it(ask) -> None:
    """Its length is told, and the connection serves the next request."""
    made = await ask(post(b"/v1/images", {"prompt": "a", "response_format": "url"}))
    url = json.loads(made.partition(b"\r\n\r\n")[2])["data"][0]["url"]
    path = url.removeprefix("http://localhost").encode()
    got = await ask(b"GET %s HTTP/1.0\r\n\r\n" % path)
    answer = await ask(head(path), LAST)

    assert b"content-length: %d\r\n" % len(got.partition(b"\r\n\r\n")[2]) in answer
    assert statuses(answer) == [b"200", b"200"]
    assert b"PNG" not in answer


async def test_http_1_0_needs_no_host(ask) -> None:
    """HAProxy's oldest check is exactly this; HTTP/1.1 without Host is 400."""
    assert statuses(await ask(b"GET /v1/models HTTP/1.0\r\n\r\n")) == [b"200"]
    without = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert statuses(await ask(without)) == [b"400"]


async def test_slashes_too_many_make_a_picture(ask, service) -> None:
    """No redirect, and no other reading of `//` as the name of a host."""
    spellings = (b"//generate", b"/generate/", b"//generate//", b"/generate/?a=b")
    for path in spellings:
        answer = await ask(post(path, {"prompt": "a"}))

        assert statuses(answer) == [b"200"]
        assert b"location" not in answer.partition(b"\r\n\r\n")[0]
    assert len(service.tickets) == len(spellings)
