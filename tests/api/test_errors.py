"""What goes wrong is told the same way on every route."""

from __future__ import annotations

import gzip
import logging

import pytest

from app.api.errors import REPLIES
from app.errors import Kind, KleinError
from tests.api.conftest import error_of

EXPECTED = {
    Kind.INVALID: (400, "invalid_request_error", "invalid_value", "invalid"),
    Kind.UNAUTHORIZED: (401, "invalid_request_error", "invalid_api_key", "unauthorized"),
    Kind.ORIGIN: (403, "invalid_request_error", "origin_not_allowed", "unauthorized"),
    Kind.NOT_FOUND: (404, "invalid_request_error", "unknown_url", "invalid"),
    Kind.METHOD_NOT_ALLOWED: (405, "invalid_request_error", "method_not_allowed", "invalid"),
    Kind.TOO_LARGE: (413, "invalid_request_error", "request_too_large", "invalid"),
    Kind.UNSUPPORTED_MEDIA: (415, "invalid_request_error", "unsupported_media_type", "invalid"),
    Kind.UNSUPPORTED_ENCODING: (415, "invalid_request_error", "unsupported_media_type", "invalid"),
    Kind.RATE_LIMITED: (429, "rate_limit_error", "rate_limit_exceeded", "rejected"),
    Kind.QUEUE_FULL: (503, "service_unavailable_error", "server_is_overloaded", "rejected"),
    Kind.LOADING: (503, "service_unavailable_error", "model_loading", "rejected"),
    Kind.DRAINING: (503, "service_unavailable_error", "shutting_down", "rejected"),
    Kind.WORKER_DOWN: (503, "service_unavailable_error", "model_loading", "rejected"),
    Kind.CANCELLED: (499, "invalid_request_error", "client_closed_request", "cancelled"),
    Kind.DEADLINE: (504, "server_error", "deadline_exceeded", "deadline"),
    Kind.OUT_OF_MEMORY: (500, "server_error", "out_of_memory", "oom"),
    Kind.FAILED: (500, "server_error", "generation_failed", "error"),
    Kind.FATAL: (500, "server_error", "generation_failed", "error"),
    Kind.INTERNAL: (500, "server_error", "internal_error", "error"),
    Kind.STARTUP: (500, "server_error", "internal_error", "error"),
}
ROUTES = ("/generate", "/v1/images/generations", "/v1/images")


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.value)
@pytest.mark.parametrize("route", ROUTES)
async def test_every_kind_has_its_answer(client, service, runtime, kind, route):
    """Status, type, code and the word it is counted under come from one table, on every route."""
    service.script.error = KleinError("One plain sentence.", kind=kind, param="prompt")
    response = await client.post(route, json={"prompt": "a"})
    status, type_, code, outcome = EXPECTED[kind]

    assert status == response.status_code
    assert error_of(response) == {
        "message": "One plain sentence.",
        "type": type_,
        "param": "prompt",
        "code": code,
    }
    assert runtime.metrics.finished == [(route, outcome)]


def test_no_kind_is_forgotten():
    """A new kind without an answer would be a crash in front of a client."""
    assert set(Kind) == set(REPLIES)


@pytest.mark.parametrize("kind", [kind for kind in Kind if EXPECTED[kind][0] == 503])
@pytest.mark.parametrize(("asked_s", "expected"), [(None, "5"), (0, "1"), (7, "7"), (900, "60")])
async def test_what_cannot_be_taken_now_says_when_to_come_again(
    client, service, kind, asked_s, expected
):
    """`Retry-After` is a whole number from 1 to 60, which all clients honour."""
    service.script.error = KleinError("Not now.", kind=kind, retry_after_s=asked_s)
    response = await client.post("/generate", json={"prompt": "a"})

    assert expected == response.headers["retry-after"]
    assert "x-should-retry" not in response.headers


@pytest.mark.parametrize("kind", [Kind.DEADLINE, Kind.OUT_OF_MEMORY, Kind.FAILED, Kind.INTERNAL])
async def test_a_failed_picture_is_not_to_be_tried_again(client, service, kind):
    """The SDK would run the job twice more without being told."""
    service.script.error = KleinError("It failed.", kind=kind)
    response = await client.post("/generate", json={"prompt": "a"})

    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind.QUEUE_FULL, "queue_full"),
        (Kind.LOADING, "loading"),
        (Kind.DRAINING, "draining"),
        (Kind.WORKER_DOWN, "worker_down"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_closed_service_refuses_before_it_reads(
    client, service, runtime, kind, reason, route
):
    """The body is not even looked at, and the refusal is counted under its reason."""
    service.closed_by = kind
    response = await client.post(
        route, content=b"{ this is no JSON", headers={"content-type": "application/json"}
    )

    assert response.status_code == 503
    assert error_of(response)["code"] == EXPECTED[kind][2]
    assert runtime.metrics.rejected == [reason]


async def test_an_unexpected_exception_is_answered_without_a_trace(
    client, service, runtime, monkeypatch, caplog
):
    """The caller gets a fixed sentence, the log the traceback."""

    def explode(*arguments, **named):
        raise RuntimeError("secret at 0x7f3a and /home/x")

    monkeypatch.setattr(service, "admit", explode)
    response = await client.post("/generate", json={"prompt": "a"})

    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert runtime.metrics.finished == [("/generate", "error")]
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)


async def test_an_unknown_address_is_an_error_object(client):
    """404 looks like every other error."""
    response = await client.get("/v1/images/variations")

    assert response.status_code == 404
    assert error_of(response)["code"] == "unknown_url"


@pytest.mark.parametrize(
    ("path", "reason", "instead"),
    [
        ("/v1/images/variations", "the model needs a prompt", "/v1/images/edits"),
        ("/v1/responses", "no language model", "/v1/images/generations"),
        ("/v1/responses/resp_1", "no language model", "/v1/images/generations"),
        ("/openai/deployments/a/images/generations", "no deployment to choose", "/v1"),
        ("/openai/deployments/a/images/edits", "no deployment to choose", "/v1"),
    ],
)
async def test_what_stays_out_says_why_in_one_sentence(client, path, reason, instead):
    """404, with the address to ask instead."""
    response = await client.post(path, json={"prompt": "a"}, params={"api-version": "2025-04-01"})
    error = error_of(response)

    assert (response.status_code, error["code"]) == (404, "unknown_url")
    assert reason in str(error["message"])
    assert str(error["message"]).endswith(f"http://127.0.0.1:8000{instead}.")
    assert ". " not in str(error["message"])


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/images/generations", {"background": "transparent"}, "knows no transparency"),
        ("/v1/images/edits", {"images": [{}] * 5}, "takes memory and time"),
        ("/generate", {"images": ["AAAA"] * 5}, "takes memory and time"),
    ],
)
async def test_a_value_that_stays_out_says_why_in_one_sentence(client, path, body, reason):
    """400, and what to send instead."""
    response = await client.post(path, json={"prompt": "a", **body})
    error = error_of(response)

    assert (response.status_code, error["param"]) == (400, next(iter(body)))
    assert ", since " in str(error["message"])
    assert reason in str(error["message"])
    assert ". " not in str(error["message"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("PUT", "/v1/images/generations", "POST"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_names_the_right_one(client, method, path, allowed):
    """405 comes with `Allow`."""
    response = await client.request(method, path)

    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "sent",
    [
        {"data": {"prompt": "a"}},
        {"content": b'{"prompt": "a"}'},
        {"content": b'{"prompt": "a"}', "headers": {"content-type": "text/plain"}},
        {"files": {"prompt": (None, "a")}},
    ],
    ids=["form", "none", "text", "multipart"],
)
async def test_only_json_is_taken(client, service, route, sent):
    """A web page cannot send JSON to another origin unasked, a form or a text it can."""
    response = await client.post(route, **sent)

    assert response.status_code == 415
    assert "content-type: application/json" in str(error_of(response)["message"])
    assert not service.tickets


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x-gzip", "GZIP"])
@pytest.mark.parametrize("route", [*ROUTES, "/v1/images/edits", "/sdapi/v1/txt2img"])
async def test_a_compressed_body_is_refused_as_one(client, service, route, encoding):
    """415 with the encodings that are read (RFC 9110 15.5.16), before any of it is."""
    pulled = []

    async def body():
        pulled.append(1)
        yield gzip.compress(b'{"prompt": "a"}')

    headers = {"content-type": "application/json", "content-encoding": encoding}
    response = await client.post(route, content=body(), headers=headers)

    assert (response.status_code, response.headers["accept-encoding"]) == (415, "identity")
    assert "Content-Encoding" in response.text
    assert not pulled
    assert not service.tickets


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_plain_body_may_say_that_it_is_plain(client, encoding):
    """No encoding at all; a refused type has nothing to do with encodings."""
    plain = await client.post(
        "/generate", json={"prompt": "a"}, headers={"content-encoding": encoding}
    )
    text = await client.post("/generate", content=b"a", headers={"content-type": "text/plain"})

    assert plain.status_code == 200
    assert text.status_code == 415
    assert "accept-encoding" not in text.headers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "\xff"}',
        "{}".encode("utf-16"),
    ],
    ids=["empty", "cut", "list", "text", "null", "nan", "digits", "deep", "bytes", "utf-16"],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_broken_json_is_said_to_be_broken(client, service, route, body):
    """Whatever is wrong with it, it is the caller's mistake and never a crash."""
    response = await client.post(route, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"
    assert error_of(response)["param"] is None
    assert not service.tickets
