"""`/v1/jobs`: a client's own jobs, seen and taken back; nobody else's."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from app.api.app import create_app
from app.domain import Progress, Stage
from app.settings import Settings
from tests.api.conftest import client_of
from tests.api.sockets import until
from tests.support.in_process import InProcess

KEYS = ("first-key-1234", "second-key-5678")
SECRET = "a fox that nobody else may see"


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def running():
    """The real service, whose pictures wait."""
    runtime = InProcess()
    runtime.worker.release.clear()
    return runtime


@pytest.fixture
async def client(running):
    """A client of it; there are two keys."""
    app = create_app(Settings.read({}, api_keys=KEYS), lambda _: running)
    async with client_of(app) as client:
        yield client


def ask(client, key: str, path="/v1/images/generations", request_id="r", **body):
    """Ask for pictures."""
    return asyncio.create_task(
        client.post(
            path,
            json={"prompt": SECRET, **body},
            headers=bearer(key) | {"x-request-id": request_id},
        )
    )


async def listed(client, key: str) -> list[dict[str, object]]:
    """The jobs that a key sees."""
    response = await client.get("/v1/jobs", headers=bearer(key))
    answer = response.json()

    assert response.status_code == 200
    assert set(answer) == {"object", "data", "has_more"}
    assert (answer["object"], answer["has_more"]) == ("list", False)
    return answer["data"]


async def take_back(client, key: str, id: object) -> httpx.Response:
    """Cancel a job."""
    return await client.delete(f"/v1/jobs/{id}", headers=bearer(key))


async def end(running, *asked):
    """Let all pictures be made; returns the answers' statuses."""
    running.worker.release.set()
    return [(await each).status_code for each in asked]


async def test_a_client_sees_what_it_waits_for(client, running):
    """In the order of arrival: one runs, the other waits behind the first one's second picture."""
    first = ask(client, KEYS[0], n=2, request_id="one")
    await running.worker.started.wait()
    second = ask(client, KEYS[0], path="/generate", request_id="two")
    await until(lambda: running.queue.size == 2)
    running.queue._running[0].step = 1
    jobs = await listed(client, KEYS[0])

    assert len({job.pop("id") for job in jobs}) == 2
    assert all(isinstance(job.pop("created"), int) for job in jobs)
    assert jobs == [
        {
            "object": "job",
            "request_id": "one",
            "state": "running",
            "position": None,
            "images": 2,
            "images_done": 0,
            "progress": 0.125,
        },
        {
            "object": "job",
            "request_id": "two",
            "state": "queued",
            "position": 1,
            "images": 1,
            "images_done": 0,
            "progress": 0.0,
        },
    ]
    assert await end(running, first, second) == [200, 200]
    assert await listed(client, KEYS[0]) == []


async def test_the_steps_of_the_worker_are_its_progress(client, running):
    """Of a stream too, which reads them itself."""

    async def run(job_id, spec, on_progress):
        on_progress(Progress(Stage.DENOISE, 3, 4))
        return await type(running.worker).run(running.worker, job_id, spec, on_progress)

    running.worker.run = run
    stream = ask(client, KEYS[0], stream=True)
    await running.worker.started.wait()

    assert [job["progress"] for job in await listed(client, KEYS[0])] == [0.75]
    assert await end(running, stream) == [200]


async def test_nobody_sees_or_cancels_anothers(client, running):
    """With two keys: no job, no prompt, no preview; and an id that is known is of no use."""
    mine = [ask(client, KEYS[0]), ask(client, KEYS[0])]
    await running.worker.started.wait()
    await until(lambda: running.queue.size == 1)
    own = await listed(client, KEYS[0])

    assert len(own) == 2
    assert await listed(client, KEYS[1]) == []
    unknown = await take_back(client, KEYS[1], "0123456789abcdef")
    for job in own:
        refused = await take_back(client, KEYS[1], job["id"])
        assert refused.status_code == 404
        assert refused.json() == unknown.json()
    assert await end(running, *mine) == [200, 200]


async def test_not_even_the_owner_is_told_what_is_drawn(client, running):
    """Several people may share a key, or an address where there are none."""
    mine = ask(client, KEYS[0], stream=True, partial_images=2)
    await running.worker.started.wait()
    listing = await client.get("/v1/jobs", headers=bearer(KEYS[0]))
    answer = await take_back(client, KEYS[0], listing.json()["data"][0]["id"])

    assert SECRET not in listing.text + answer.text
    assert not {"prompt", "preview", "b64_json", "seed"} & set(answer.json())
    await end(running, mine)


async def test_one_that_waits_is_cancelled(client, running):
    """It never runs; its request ends at once and the others go on."""
    first = ask(client, KEYS[0])
    await running.worker.started.wait()
    second, third = ask(client, KEYS[0], request_id="x", n=2), ask(client, KEYS[1])
    await until(lambda: running.queue.size == 3)
    (job,) = [job for job in await listed(client, KEYS[0]) if job["request_id"] == "x"]
    answer = await take_back(client, KEYS[0], job["id"])

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert answer.json()["id"] == job["id"]
    assert (answer.json()["images_done"], answer.json()["progress"]) == (0, 0.0)
    assert (await second).status_code == 499
    assert (await second).json()["error"]["message"] == "The request was cancelled."
    assert running.queue.size == 1
    assert await end(running, first, third) == [200, 200]
    assert running.worker.made == 2


async def test_one_that_runs_is_cancelled(client, running):
    """The card is free for the next; a second time there is nothing to cancel."""
    first = ask(client, KEYS[0], stream=True)
    await running.worker.started.wait()
    second = ask(client, KEYS[1])
    await until(lambda: running.queue.size == 1)
    (job,) = await listed(client, KEYS[0])

    assert (await take_back(client, KEYS[0], job["id"])).status_code == 200
    assert '"code": "client_closed_request"' in (await first).text
    again = await take_back(client, KEYS[0], job["id"])
    assert again.status_code == 404
    assert again.json()["error"]["code"] == "job_not_found"
    assert await end(running, second) == [200]
    assert running.worker.made == 1


async def test_without_keys_an_address_is_a_client(running):
    """The jobs of all that ask from it."""
    app = create_app(Settings.read({}), lambda _: running)
    async with client_of(app) as client:
        mine = ask(client, "none")
        await running.worker.started.wait()
        (job,) = await listed(client, "none")
        assert (await take_back(client, "none", job["id"])).status_code == 200
        assert (await mine).status_code == 499


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/jobs"), ("DELETE", "/v1/jobs/abc")])
async def test_a_key_is_needed(client, method, path):
    """Where keys are set."""
    assert (await client.request(method, path)).status_code == 401


async def test_a_page_of_another_origin_cancels_nothing(running):
    """Nor could it know an id, since it cannot read the list."""
    app = create_app(Settings.read({}), lambda _: running)
    async with client_of(app) as client:
        response = await client.delete("/v1/jobs/abc", headers={"origin": "http://evil.example"})

    assert response.status_code == 403


async def test_those_of_the_other_dialect_are_listed_too(client, running):
    """And `interrupt` there stops only its own."""
    first = ask(client, KEYS[0], path="/sdapi/v1/txt2img", request_id="sd")
    await running.worker.started.wait()
    second = ask(client, KEYS[0], request_id="openai")
    await until(lambda: running.queue.size == 1)

    assert [job["request_id"] for job in await listed(client, KEYS[0])] == ["sd", "openai"]
    await client.post("/sdapi/v1/interrupt", headers=bearer(KEYS[0]))
    assert (await first).status_code == 499
    assert [job["request_id"] for job in await listed(client, KEYS[0])] == ["openai"]
    assert await end(running, second) == [200]


async def test_a_list_has_an_end(client, running, monkeypatch):
    """However many jobs a client has."""
    monkeypatch.setattr("app.api.system.jobs.MAX_LISTED", 2)
    mine = []
    for number in range(3):
        mine.append(ask(client, KEYS[0], request_id=str(number)))
        await until(lambda: running.queue.size + running.queue.running == len(mine))
    answer = (await client.get("/v1/jobs", headers=bearer(KEYS[0]))).json()

    assert [job["request_id"] for job in answer["data"]] == ["0", "1"]
    assert answer["has_more"] is True
    await end(running, *mine)


async def test_nothing_is_kept_of_what_has_ended(client, running):
    """However it ended."""
    running.worker.errors[1] = RuntimeError("a bug")
    mine = [ask(client, KEYS[0]), ask(client, KEYS[1])]
    await running.worker.started.wait()

    assert sorted(await end(running, *mine)) == [200, 500]
    assert running.service._tickets._of == {}
