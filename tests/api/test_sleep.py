"""`/sleep` and `/wake`: who may ask, what is read, and what is answered."""

from __future__ import annotations

import pytest

from app.api.app import create_app
from app.settings import Settings
from app.worker.rest import Cause
from tests.api.conftest import client_of
from tests.support.fakes import FakeWorkers
from tests.support.in_process import InProcess

KEY = "a-key-of-sixteen"
ROUTES = [("POST", "/sleep"), ("POST", "/wake"), ("POST", "/wake_up"), ("GET", "/is_sleeping")]


@pytest.fixture
def runtime(monkeypatch):
    """The real service, whose pool only notes what is asked of it."""
    runtime = InProcess()
    monkeypatch.setattr(runtime, "workers", FakeWorkers(), raising=False)
    return runtime


def served(runtime, **settings: object):
    """A client of *runtime*."""
    return client_of(create_app(Settings.read({}, **settings), lambda _: runtime))


async def test_both_are_asked_of_all_workers(runtime) -> None:
    """By either name, with the level of vLLM's clients in the query, in JSON, or not at all."""
    async with served(runtime) as client:
        for request in (
            {},
            {"params": {"level": "1"}},
            {"json": {"level": 2}},
            {"json": {"level": "1", "tags": ["weights"]}},
        ):
            answer = await client.post("/sleep", **request)
            assert answer.status_code == 200, answer.text
            assert set(answer.json()) == {"is_sleeping", "state", "message"}
        await client.post("/wake")
        await client.post("/wake_up")
        assert (await client.get("/is_sleeping")).json()["is_sleeping"] is False
    assert runtime.workers.asked == [("sleep", Cause.ASKED)] * 4 + [("wake", Cause.ASKED)] * 2


@pytest.mark.parametrize(
    "request_",
    [
        {"params": {"level": "0"}},
        {"params": {"level": "x" * 3000}},
        {"json": {"level": True}},
        {"json": {"level": [1]}},
        {"json": [1]},
    ],
)
async def test_another_level_is_refused(runtime, request_) -> None:
    """No client sets a time, or anything else."""
    async with served(runtime) as client:
        answer = await client.post("/sleep", **request_)
    assert answer.status_code == 400
    assert runtime.workers.asked == []


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_it_needs_what_a_picture_needs(runtime, method: str, path: str) -> None:
    """A key where keys are set."""
    async with served(runtime, api_keys=(KEY,)) as client:
        assert (await client.request(method, path)).status_code == 401
        found = await client.request(method, path, headers={"authorization": f"Bearer {KEY}"})
        assert found.status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES[:3])
async def test_no_page_of_another_origin_may(runtime, method: str, path: str) -> None:
    """A page that somebody visits must not be able to take the card away or back."""
    async with served(runtime) as client:
        answer = await client.request(method, path, headers={"origin": "https://evil.example"})
    assert answer.status_code == 403
    assert runtime.workers.asked == []


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_it_can_be_turned_off(runtime, method: str, path: str) -> None:
    """Then there are no such routes."""
    async with served(runtime, sleep_api=False) as client:
        assert (await client.request(method, path)).status_code == 404
