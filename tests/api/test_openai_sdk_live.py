"""What the official `openai` SDK is promised when jobs fail or wait, on a live scripted service."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import (
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    InternalServerError,
    OpenAI,
)

from tests.api.pictures import photo
from tests.api.sockets import until
from tests.support.server import Server

pytestmark = pytest.mark.slow

KEY = "acceptance-key-1234"
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def failing() -> Iterator[Server]:
    """A service with a key, whose first four pictures fail, each in its own way."""
    with start("oom@1", "oom@2", "fail@3", "late@4", api_keys=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the slow service's engine notes what it stopped."""
    return tmp_path_factory.mktemp("slow") / "trace"


@pytest.fixture(scope="module")
def slow(trace: Path) -> Iterator[Server]:
    """A service that takes 0.6 s for a picture and lets one wait."""
    with start("slow=0.6", f"trace={trace}", queue_images=1) as server:
        yield server


def start(*script: str, **settings: object) -> Server:
    """Start a service on the scripted engine, with klein's ids and limits."""
    settings = {"model": "flux.2-klein-4b", "device": "cpu", **settings}
    return Server("heartbeat=0.1", *script, module="tests.api.live", **settings)


def sdk(server: Server, **options) -> OpenAI:
    """The SDK's client."""
    return OpenAI(base_url=server.url + "/v1", **{"api_key": KEY, "max_retries": 0, **options})


def test_failed_jobs_are_told_and_not_run_again(failing):
    """In a stream after its previews, else with `x-should-retry: false`: one request each."""
    seen = []
    with sdk(failing, max_retries=2) as client:
        stream = client.images.generate(prompt="a", stream=True, partial_images=2)
        with pytest.raises(APIError) as caught:
            seen.extend(stream)

        assert caught.value.code == "out_of_memory"
        assert [event.partial_image_index for event in seen] == [0, 1]

        for status, code in (
            (500, "out_of_memory"),
            (500, "generation_failed"),
            (504, "deadline_exceeded"),
        ):
            with pytest.raises(APIStatusError) as refused:
                client.images.generate(prompt="a", size="64x64")

            assert (refused.value.status_code, refused.value.code) == (status, code)
            assert refused.value.request_id

    outcomes = {
        outcome: failing.metric("klein_requests_total", route=ROUTE, outcome=outcome)
        for outcome in ("oom", "error", "deadline", "ok")
    }

    assert outcomes == {"oom": 2, "error": 1, "deadline": 1, "ok": 0}


@pytest.mark.full
def test_a_stream_that_waits_is_kept_alive(slow):
    """Two comments at least, and a normal end."""
    body = {"prompt": "a", "stream": True}
    with httpx.stream("POST", slow.url + ROUTE, json=body, timeout=30) as answer:
        text = answer.read().decode()

    assert text.count(": keep-alive\n\n") >= 2
    assert text.count("event: image_generation.completed\n") == 1


async def test_a_full_queue_says_when_to_come_again(slow):
    """503 with OpenAI's own words and a whole number of seconds; what was taken succeeds."""
    async with AsyncOpenAI(base_url=slow.url + "/v1", api_key=KEY, max_retries=0) as client:
        calls = [client.images.generate(prompt="a", size="64x64") for _ in range(6)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in results if isinstance(each, InternalServerError)]

    assert len(refused) + len([each for each in results if not isinstance(each, Exception)]) == 6
    assert 4 <= len(refused) <= 5
    for error in refused:
        assert (error.status_code, error.code) == (503, "server_is_overloaded")
        assert error.type == "service_unavailable_error"
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.request_id


def test_a_wrong_key_opens_nothing(failing):
    """On every API route."""
    with sdk(failing, api_key="wrong-key-0000") as client:
        for call in (
            client.models.list,
            lambda: client.models.retrieve("flux.2-klein-4b"),
            lambda: client.images.generate(prompt="a"),
            lambda: client.images.edit(image=photo(64, 64), prompt="a"),
            lambda: client.post("/images", body={"prompt": "a"}, cast_to=object),
            lambda: client.get(f"{failing.url}/health", cast_to=object),
        ):
            with pytest.raises(AuthenticationError) as caught:
                call()

            assert caught.value.code == "invalid_api_key"
    with sdk(failing) as client:
        assert client.models.list().data


async def test_a_clients_timeout_ends_its_job(slow, trace):
    """Within a step, and the next job starts."""
    with sdk(slow, timeout=0.3) as client, pytest.raises(APITimeoutError):
        await asyncio.to_thread(client.images.generate, prompt="a", extra_body={"steps": 50})
    await until(lambda: trace.exists() and "stopped " in trace.read_text())

    assert slow.metric("klein_requests_total", route=ROUTE, outcome="cancelled") == 1
    assert slow.metric("klein_requests_running") == 0
