"""Odd request lines over a real socket: HEAD, HTTP/1.0, slashes too many."""

from __future__ import annotations

import json

import pytest

from tests.security.conftest import send_raw

pytestmark = pytest.mark.slow

LAST = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BODY = json.dumps({"prompt": "a", "width": 128, "height": 128}).encode()


def heads(answer: bytes) -> list[bytes]:
    """The status of each answer in *answer*."""
    return [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@pytest.mark.parametrize("path", [b"/health", b"/v1/models", b"/metrics", b"/", b"/nope"])
def test_nothing_stands_behind_the_head_of_a_head(scripted_service, path) -> None:
    """A body there would be taken for the next answer on the same connection."""
    answer = send_raw(
        scripted_service, b"HEAD " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST
    )
    first, _, rest = answer.partition(b"\r\n\r\n")

    assert b"content-length: 0" not in first
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n")
    assert heads(answer) == [b"404" if path == b"/nope" else b"200", b"200"]


def test_head_of_a_picture_sends_none_of_it(scripted_service) -> None:
    """Its length is told, and the connection serves the next request."""
    asked = {"prompt": "a", "size": "256x256", "response_format": "url"}
    made = json.loads(scripted_service.post("/v1/images/generations", asked)[2])
    path = made["data"][0]["url"].removeprefix(scripted_service.url).encode()
    size = len(scripted_service.get(path.decode())[2])
    answer = send_raw(
        scripted_service, b"HEAD " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" + LAST
    )

    assert b"content-length: %d\r\n" % size in answer
    assert heads(answer) == [b"200", b"200"]
    assert b"PNG" not in answer


def test_http_1_0_needs_no_host(scripted_service) -> None:
    """HAProxy's oldest check is exactly this; HTTP/1.1 without Host is 400."""
    assert heads(send_raw(scripted_service, b"GET /v1/models HTTP/1.0\r\n\r\n")) == [b"200"]
    without = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert heads(send_raw(scripted_service, without)) == [b"400"]


@pytest.mark.parametrize("path", [b"//generate", b"/generate/", b"//generate//", b"/generate/?a=b"])
def test_slashes_too_many_make_a_picture(scripted_service, path) -> None:
    """No redirect, and no other reading of `//` as the name of a host."""
    before = scripted_service.metric("klein_images_total", mode="generate")
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\nHost: localhost" % len(BODY)
    answer = send_raw(
        scripted_service,
        b"POST " + path + b" HTTP/1.1\r\n" + head + b"\r\nConnection: close\r\n\r\n" + BODY,
    )

    assert heads(answer) == [b"200"]
    assert b"location" not in answer.partition(b"\r\n\r\n")[0]
    assert scripted_service.metric("klein_images_total", mode="generate") == before + 1
