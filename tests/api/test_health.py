"""Alive, ready, and what the worker says; and the scrape."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import Kind
from tests.api.conftest import error_of
from tests.api.sockets import until
from tests.support.fakes import FakeScrape

STATES = [
    (Kind.LOADING, "loading", "model_loading"),
    (Kind.DRAINING, "draining", "shutting_down"),
    (Kind.WORKER_DOWN, "restarting", "model_loading"),
]


@pytest.mark.parametrize("state", [None, *(kind for kind, _, _ in STATES)])
async def test_alive_is_not_ready(client, service, state):
    """A process that loads for minutes must not be killed for it."""
    service.closed_by = state

    assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health"])
@pytest.mark.parametrize("state", [None, Kind.LOADING])
async def test_a_service_that_has_given_up_is_not_alive(client, service, path, state):
    """503 until the process has ended, so that whatever watches it replaces it."""
    service.has_failed, service.closed_by = True, state
    response = await client.get(path)

    assert response.status_code == 503
    assert error_of(response)["message"]
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/health/ready", "/health"])
async def test_ready_is_said_with_the_stage(client, path):
    """200 and no error."""
    response = await client.get(path)

    assert response.status_code == 200
    assert response.json()["ready"] is True
    assert response.json()["stage"] == "ready"
    assert "error" not in response.json()


@pytest.mark.parametrize(("state", "stage", "code"), STATES)
@pytest.mark.parametrize("path", ["/health/ready", "/health"])
async def test_not_ready_says_why_and_when(client, service, path, state, stage, code):
    """503 with stage, progress and reason, and the error object beside them."""
    service.closed_by = state
    response = await client.get(path)
    body = response.json()

    assert response.status_code == 503
    assert stage == body["stage"]
    assert body["ready"] is False
    assert body["reason"]
    assert code == error_of(response)["code"]
    assert 1 <= int(response.headers["retry-after"]) <= 60


async def test_a_full_queue_is_still_ready(client, service):
    """It refuses with 503 itself; taking it out of the rotation would lose the replica."""
    service.closed_by = Kind.QUEUE_FULL

    assert (await client.get("/health/ready")).status_code == 200


async def test_health_tells_model_precision_and_plan(client):
    """With the reasons."""
    body = (await client.get("/health")).json()

    assert body["model"] == "flux.2-klein-4b"
    assert body["worker"]["precision"] == "int8"
    assert body["worker"]["precision_reason"]
    assert body["worker"]["plan_reasons"]
    assert body["worker"]["advice"] == []
    assert body["queue"]["capacity"] == 32


async def test_an_unready_probe_is_not_a_refused_request(client, service, runtime):
    """Probes come every few seconds; counted as rejections they would hide the real ones."""
    service.closed_by = Kind.LOADING
    await client.get("/health/ready")

    assert runtime.metrics.finished == [("/health/ready", "ok")]
    assert not runtime.metrics.rejected


async def test_a_scrape_that_is_written_holds_up_nobody(client):
    """It is long where there are many cards, so another thread writes it."""
    FakeScrape.is_begun.clear()
    FakeScrape.may_write.clear()
    try:
        scrape = asyncio.create_task(client.get("/metrics"))
        await until(FakeScrape.is_begun.is_set)
        assert (await client.get("/health/live")).status_code == 200
        assert not scrape.done()
    finally:
        FakeScrape.may_write.set()

    assert (await scrape).status_code == 200


async def test_a_scrape_has_prometheus_own_content_type(client):
    """With its version, as the client library says it."""
    response = await client.get("/metrics")

    assert response.status_code == 200
    assert response.text == "klein_fake 1\n"
    assert response.headers["content-type"].startswith("text/plain; version=")
