"""More work than the card can do, callers who leave, and deadlines."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.test_service import wait_until
from tests.support.chaos import Answer, ask, port_of, request_bytes
from tests.support.server import Server
from tests.support.several import WITH_SEVERAL, count_of, devices
from tests.support.timing import TIMED

SMALL = {"prompt": "x", "width": 128, "height": 128}
ROUNDS = 3
"""Figures in milliseconds are taken in the best of three rounds: others may use the machine too."""


@pytest.mark.slow
@WITH_SEVERAL
def test_a_full_queue_refuses_at_once_and_keeps_its_word(
    scripted, device: str, tmp_path: Path
) -> None:
    """Queue 4, fifty at once: exactly 5 x 200 with one worker, 7 with three, and else 503 with a
    Retry-After of 1 to 60, all refusals while the first pictures are still on the cards; the
    gauges return to zero."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", queue_images=4, device=device)
    taken = 4 + count_of(device)
    wait_until(lambda: sum(each["ready"] for each in devices(server)) == count_of(device))

    async def storm() -> list[Answer]:
        body = request_bytes("/generate", SMALL)
        asking = [asyncio.create_task(ask(port_of(server), body)) for _ in range(50)]
        waiting = asyncio.as_completed(asking)
        refused = [await next(waiting) for _ in range(50 - taken)]
        assert {answer.status for answer in refused} == {503}
        gate.touch()
        return await asyncio.gather(*asking)

    answers = asyncio.run(storm())
    refused = [answer for answer in answers if answer.status == 503]

    assert Counter(answer.status for answer in answers) == {200: taken, 503: 50 - taken}
    assert {answer.code for answer in refused} == {"server_is_overloaded"}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert server.metric("klein_queue_size") == 0
    assert server.metric("klein_requests_running") == 0


@pytest.mark.slow
def test_a_full_queue_does_not_read_uploads(scripted, tmp_path: Path) -> None:
    """An upload of 60 MB gets its 503 before its first byte is sent. The bound counts images, so
    one request for four fills it, and one for five can never fit."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", queue_images=4)
    server.wait_until_ready()
    four = {"prompt": "x", "n": 4, "size": "128x128"}
    never = server.post("/v1/images/generations", four | {"n": 5})
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(server.post, "/generate", SMALL)
        wait_until(lambda: server.metric("klein_requests_running") == 1)
        filling = pool.submit(server.post, "/v1/images/generations", four)
        wait_until(lambda: server.metric("klein_queue_size") == 4)
        head = (
            b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 60000000\r\n\r\n"
        )
        upload = asyncio.run(ask(port_of(server), head, limit_s=20))
        gate.touch()

        assert (upload.status, upload.code) == (503, "server_is_overloaded")
        assert json.loads(never[2])["error"]["param"] == "n"
        assert never[0] == 400
        assert one.result()[0] == 200
        assert filling.result()[0] == 200


@pytest.mark.slow
def test_eight_pictures_do_not_make_another_client_wait(scripted, tmp_path: Path) -> None:
    """One client's eight are in line when another asks for one; the one comes second."""
    gate, keys = tmp_path / "gate", ("first-key-1234", "other-key-5678")
    server = scripted("slow=0.05", f"gate={gate}", api_keys=",".join(keys))
    server.wait_until_ready()
    eight = {"prompt": "x", "n": 8, "size": "128x128"}
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(server.post, "/v1/images/generations", eight, api_key=keys[0])
        wait_until(lambda: server.metric("klein_queue_size") == 7)
        one = pool.submit(server.post, "/generate", SMALL, api_key=keys[1])
        wait_until(lambda: server.metric("klein_queue_size") == 8)
        gate.touch()

        assert one.result()[0] == 200
        assert not many.done()
        assert many.result()[0] == 200


def picture_form() -> bytes:
    """A whole edit request, as a form with one picture."""
    from tests.images import picture, saved
    from tests.security.test_attacks import form

    image = saved(picture("smooth").resize((128, 128)), "PNG")
    body, kind = form({"prompt": "x", "size": "128x128"}, [("image", "a.png", image)])
    return (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@pytest.mark.slow
@TIMED
@WITH_SEVERAL
def test_a_queued_job_whose_caller_left_never_runs(
    scripted, device: str, tmp_path: Path, is_timed: bool
) -> None:
    """On every route, edits and streams too, it leaves the queue within 250 ms (with our
    middleware around), and only the first picture is ever made."""
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    server = scripted(f"gate={gate}", f"trace={trace}", device=device)
    workers = count_of(device)
    wait_until(lambda: sum(each["ready"] for each in devices(server)) == workers)
    image = {"prompt": "x", "size": "128x128"}
    requests = (
        request_bytes("/generate", SMALL),
        request_bytes("/v1/images/generations", image),
        request_bytes("/v1/images/generations", image | {"stream": True}),
        picture_form(),
    )

    async def leave(data: bytes) -> float:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(data)
        await writer.drain()
        await asyncio.to_thread(wait_until, lambda: server.metric("klein_queue_size") == 1)
        writer.transport.abort()
        started = time.monotonic()
        await asyncio.to_thread(wait_until, lambda: server.metric("klein_queue_size") == 0)
        return time.monotonic() - started

    with ThreadPoolExecutor(workers) as pool:
        first = [pool.submit(server.post, "/generate", SMALL) for _ in range(workers)]
        wait_until(lambda: server.metric("klein_requests_running") == workers)
        for data in requests:
            left_s = [asyncio.run(leave(data)) for _ in range(ROUNDS if is_timed else 1)]
            assert not is_timed or min(left_s) < 0.25
        gate.touch()

        assert [each.result()[0] for each in first] == [200] * workers
    assert server.stop() == 0
    assert trace.read_text().splitlines() == ["finished"] * workers


@pytest.mark.slow
@TIMED
@WITH_SEVERAL
def test_a_running_job_whose_caller_left_stops_within_a_step(
    scripted, device: str, tmp_path, is_timed: bool
) -> None:
    """With steps of 100 ms the card is free 350 ms later at most, and the picture is never
    finished."""
    trace = tmp_path / "trace"
    server = scripted("slow=4", f"trace={trace}", device=device)
    server.wait_until_ready()
    data = request_bytes("/generate", SMALL | {"num_inference_steps": 40})

    async def leave() -> float:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(data)
        await writer.drain()
        await asyncio.to_thread(wait_until, lambda: server.metric("klein_requests_running") == 1)
        writer.transport.abort()
        started = time.monotonic()
        await asyncio.to_thread(wait_until, lambda: server.metric("klein_requests_running") == 0)
        return time.monotonic() - started

    left_s = min(asyncio.run(leave()) for _ in range(ROUNDS))

    assert not is_timed or left_s < 0.1 + 0.25
    assert all(line.startswith("stopped ") for line in trace.read_text().splitlines())
    left = server.metric("klein_requests_total", route="/generate", outcome="cancelled")
    assert left == ROUNDS


@pytest.mark.slow
@TIMED
@WITH_SEVERAL
def test_a_header_may_shorten_the_deadline_only(
    scripted, device: str, tmp_path: Path, is_timed: bool
) -> None:
    """504 within half a second of `X-Klein-Deadline-S`, not to be repeated, its place free
    again; a longer wish than the service's own changes nothing."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", deadline_s=1.5, device=device)
    server.wait_until_ready()

    def late(wish_s: str) -> tuple[int, dict[str, str], float]:
        started = time.monotonic()
        status, headers, _ = server.post("/generate", SMALL, x_klein_deadline_s=wish_s)
        return status, headers, time.monotonic() - started

    for wish_s, due_s in (("0.5", 0.5), ("1000", 1.5)):
        took = []
        for _ in range(ROUNDS if is_timed else 1):
            status, headers, took_s = late(wish_s)
            assert (status, headers["x-should-retry"]) == (504, "false")
            took.append(abs(took_s - due_s))
            if took[-1] <= 0.5:
                break
        assert not is_timed or min(took) <= 0.5
    wait_until(lambda: server.metric("klein_requests_running") == 0)
    gate.touch()

    assert server.post("/generate", SMALL)[0] == 200


@pytest.mark.slow
@TIMED
async def test_nothing_that_is_computed_holds_up_the_loop(monkeypatch, is_timed: bool) -> None:
    """With large pictures encoded, put in base64 and uploads decoded, no single turn of the
    event loop computes for 100 ms. What is measured is computing, which does not depend on who else
    uses the machine."""
    import base64
    from asyncio import events

    import httpx

    from app.api.app import create_app
    from app.runtime import build_runtime
    from app.settings import Settings
    from tests.api.sockets import listening
    from tests.images import picture, saved
    from tests.support.scripted_engine import MakeScriptedEngine, Script

    settings = Settings.read({}, device="cpu", model="shapes")
    ready = asyncio.Event()

    def build(settings):
        runtime = build_runtime(settings, make_engine=MakeScriptedEngine(Script()))
        runtime.on_ready.append(lambda info: ready.set())
        return runtime

    image = saved(picture("grainy"), "PNG")
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    edit = json.dumps(
        {"prompt": "x", "images": [{"image_url": url}] * 2, "n": 2, "size": "512x512"}
    ).encode()
    turns_s: list[float] = []
    run = events.Handle._run

    def measured(self) -> None:
        started = time.thread_time()
        run(self)
        turns_s.append(time.thread_time() - started)

    async with listening(create_app(settings, build)) as port:
        await ready.wait()
        base_url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            headers = {"content-type": "application/json"}
            await client.get("/health/live")
            monkeypatch.setattr(events.Handle, "_run", measured)
            answers = await asyncio.gather(
                *(client.post("/v1/images/edits", content=edit, headers=headers) for _ in range(4)),
                *(client.get("/metrics") for _ in range(4)),
            )
            monkeypatch.undo()

    assert {answer.status_code for answer in answers} == {200}
    assert not is_timed or max(turns_s) < 0.1


async def flood(server: Server, data: bytes, *, every_s: float, seconds: float) -> list[Answer]:
    """Open-loop traffic: one request each *every_s* for *seconds*."""
    asking = []
    started = time.monotonic()
    while (now := time.monotonic() - started) < seconds:
        while len(asking) * every_s <= now:
            asking.append(asyncio.create_task(ask(port_of(server), data)))
        await asyncio.sleep(min(every_s, 0.01))
    return await asyncio.gather(*asking)


def p99(values: list[float]) -> float:
    """The value that 99 of 100 stay below."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


@pytest.mark.system
def test_under_full_load_refusals_and_probes_stay_fast(scripted) -> None:
    """At five times the capacity, the p99 of a refusal is below 100 ms, that of /health/live,
    asked every 50 ms, is below 100 ms, and the event loop is never more than 250 ms late."""
    live = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    async def both(server: Server) -> tuple[list[Answer], list[Answer]]:
        return await asyncio.gather(
            flood(server, request_bytes("/generate", SMALL), every_s=0.02, seconds=5),
            flood(server, live, every_s=0.05, seconds=5),
        )

    rounds = []
    for _ in range(ROUNDS):
        # A service for each round: the lag is the most of the last minute.
        server = scripted("slow=0.1", queue_images=8)
        server.wait_until_ready()
        answers, probes = asyncio.run(both(server))
        refusals = [answer.seconds for answer in answers if answer.status == 503]
        assert {answer.status for answer in probes} == {200}
        assert len(refusals) > 50
        found = (
            p99(refusals),
            p99([probe.seconds for probe in probes]),
            server.metric("klein_event_loop_lag_seconds"),
        )
        rounds.append(found)
        server.stop()
        if found[0] < 0.1 and found[1] < 0.1 and found[2] < 0.25:
            break
    else:
        pytest.fail(f"p99 of refusals, p99 of probes, lag: {rounds}")


@pytest.mark.system
def test_overload_costs_no_throughput(scripted) -> None:
    """At five times the load at least 95 % of the best throughput, and whoever was admitted
    waits at most (queue + 1) pictures and 10 %."""
    picture_s, queue = 0.2, 4
    server = scripted(f"slow={picture_s}", queue_images=queue)
    server.wait_until_ready()
    data = request_bytes("/generate", SMALL)
    rounds = []
    for _ in range(ROUNDS):
        best = goodput(asyncio.run(flood(server, data, every_s=picture_s * 0.8, seconds=5)), 5)
        answers = asyncio.run(flood(server, data, every_s=picture_s / 5, seconds=5))
        share = goodput(answers, 5) / best
        slowest_s = p99([answer.seconds for answer in answers if answer.status == 200])
        rounds.append((share, slowest_s))
        if share >= 0.95 and slowest_s <= (queue + 1) * picture_s * 1.1:
            break
    else:
        pytest.fail(f"share of the best throughput, p99 of the admitted: {rounds}")


def goodput(answers: list[Answer], seconds: float) -> float:
    """Pictures for each second."""
    return sum(answer.status == 200 for answer in answers) / seconds
