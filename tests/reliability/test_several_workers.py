"""One service with three workers, from outside: spread, kills, what is left out, the end.

Three processes share the CPU; on cards everything but the device is the same.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_service import wait_until
from tests.reliability.test_lifecycle import answer_of, in_service
from tests.support.server import Server
from tests.support.several import devices

SMALL = {"prompt": "x", "width": 128, "height": 128}
LARGE = {"prompt": "x", "width": 512, "height": 512}

pytestmark = pytest.mark.slow


def wait_until_all_are_ready(server: Server, count: int = 3) -> None:
    """All but those that are left out."""
    server.wait_until_ready()
    wait_until(lambda: sum(each["ready"] for each in devices(server)) == count)


def busy(server: Server) -> list[float]:
    """How long each worker has worked on images."""
    name = "klein_gpu_busy_seconds_total"
    return [server.metric(name, uuid=f"cpu:{index}") for index in range(3)]


def pictures(server: Server, count: int) -> Sequence[str]:
    """So many pictures of one request."""
    body = {"prompt": "x", "n": count, "size": "256x256", "seed": 5, "response_format": "b64_json"}
    status, _, answer = server.post("/v1/images/generations", body)
    assert status == 200, answer
    return [each["b64_json"] for each in json.loads(answer)["data"]]


def test_the_pictures_of_a_request_spread_and_stay_the_same(scripted) -> None:
    """Each of three workers makes some of six, and each file is what one worker makes."""
    one, three = scripted(), scripted("slow=0.1", device="cpu:3")
    one.wait_until_ready()
    wait_until_all_are_ready(three)

    assert pictures(three, 6) == pictures(one, 6)
    assert all(busy(three))


def test_a_killed_worker_costs_one_job_while_the_others_serve(scripted, tmp_path: Path) -> None:
    """Of nine jobs on three workers one is lost; nobody is refused, and the service stays ready."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", device="cpu:3")
    wait_until_all_are_ready(server)
    with ThreadPoolExecutor(9) as pool:
        jobs = [pool.submit(answer_of, server) for _ in range(9)]
        wait_until(lambda: server.metric("klein_requests_running") == 3)
        wait_until(lambda: in_service(server) == 9)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: in_service(server) == 8)
        assert server.get("/health/ready")[0] == 200
        gate.touch()
        statuses = sorted(job.result() for job in jobs)

    assert statuses == [200] * 8 + [500]
    wait_until_all_are_ready(server)
    assert sum(each["restarts"] for each in devices(server)) == 1


@pytest.mark.full
def test_a_large_picture_goes_only_where_there_is_room(scripted) -> None:
    """Two of three workers have room for 256x256: six large ones are all made by the third, small
    ones by any, and one that nobody has room for is refused with the largest size."""
    words = ("room=65536", "2:room=262144", "slow=0.05")
    server = scripted(*words, device="cpu:3", model="flux.2-klein-4b")
    wait_until_all_are_ready(server)
    with ThreadPoolExecutor(6) as pool:
        large = [pool.submit(server.post, "/generate", LARGE) for _ in range(6)]
        assert [job.result()[0] for job in large] == [200] * 6
    assert [seconds > 0 for seconds in busy(server)] == [False, False, True]

    assert [answer_of(server) for _ in range(3)] == [200] * 3
    status, _, body = server.post("/generate", LARGE | {"width": 1024})
    assert status == 400
    assert "512x512" in json.loads(body)["error"]["message"]


@pytest.mark.full
def test_a_slow_worker_gets_what_it_ends_sooner(scripted) -> None:
    """Ten times as slow as two others, it makes no picture of four, which they end before."""
    server = scripted("slow=0.1", "0:slow=1", device="cpu:3")
    wait_until_all_are_ready(server)
    assert [answer_of(server) for _ in range(2)] == [200, 200]

    pictures(server, 4)
    assert busy(server)[0] == 0


@pytest.mark.full
def test_one_that_cannot_be_kept_alive_is_left_out(scripted) -> None:
    """After its third death the others go on; /health and a metric say so."""
    server = scripted("slow=0.05", "1:exit@1", device="cpu:3")
    wait_until_all_are_ready(server)
    statuses: list[int] = []

    def is_left_out() -> bool:
        statuses.extend(pool.map(lambda _: answer_of(server), range(6)))
        return devices(server)[1]["left_out"]

    with ThreadPoolExecutor(6) as pool:
        wait_until(is_left_out)

    assert statuses.count(500) == 3
    assert set(statuses) == {200, 500}
    assert [each["ready"] for each in devices(server)] == [True, False, True]
    assert server.metric("klein_workers_left_out") == 1
    assert server.metric("klein_ready") == 1
    assert "is left out" in server.log


@pytest.mark.full
def test_one_that_cannot_load_is_left_out_and_all_end_the_service(scripted) -> None:
    """At the start too: with two others the service is ready, with none it ends and says why."""
    some, none = scripted("1:startfail", device="cpu:3"), scripted("startfail", device="cpu:3")
    wait_until_all_are_ready(some, 2)
    wait_until(lambda: [each["left_out"] for each in devices(some)] == [False, True, False])

    assert answer_of(some) == 200
    assert none.wait(timeout_s=20) == 1
    (sentence,) = [line for line in none.lines if line.startswith("klein: ")]
    assert "this is what was asked for" in sentence


@pytest.mark.full
def test_told_to_stop_all_workers_finish_what_was_accepted(scripted, tmp_path: Path) -> None:
    """Three run, four wait: all seven get their pictures, and no process is left."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", device="cpu:3")
    wait_until_all_are_ready(server)
    workers = [psutil.Process(pid) for pid in server.worker_pids()]
    with ThreadPoolExecutor(7) as pool:
        jobs = [pool.submit(answer_of, server) for _ in range(7)]
        wait_until(lambda: in_service(server) == 7)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/health/ready")[0] == 503)
        gate.touch()
        assert [job.result() for job in jobs] == [200] * 7

    assert server.wait() == 0
    assert not any(each.is_running() for each in workers)


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "reason"), [("hang", "hang"), ("sticky", "fatal_cuda"), ("exit", "killed")]
)
def test_what_befalls_one_worker_is_counted_for_its_card(
    scripted, tmp_path: Path, fault: str, reason: str
) -> None:
    """Of three jobs, one on each, one is lost; the other two and all later ones are made."""
    gate, once = tmp_path / "gate", tmp_path / "once"
    words = (f"1:{fault}@1", f"once={once}", f"gate={gate}")
    server = scripted(*words, device="cpu:3", watchdog_s=1)
    wait_until_all_are_ready(server)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(answer_of, server) for _ in range(3)]
        wait_until(lambda: server.metric("klein_requests_running") == 3)
        gate.touch()
        assert sorted(job.result() for job in jobs) == [200, 200, 500]
    wait_until_all_are_ready(server)

    assert [answer_of(server) for _ in range(4)] == [200] * 4
    lost = "klein_worker_restarts_total"
    found = [server.metric(lost, uuid=f"cpu:{index}", reason=reason) for index in range(3)]
    assert found == [0, 1, 0]


@pytest.mark.full
def test_who_leaves_frees_the_worker_that_has_its_picture(scripted, tmp_path: Path) -> None:
    """One of three clients hangs up: its picture is stopped within a step, the others' are made."""
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    server = scripted(f"gate={gate}", f"trace={trace}", device="cpu:3")
    wait_until_all_are_ready(server)
    port = int(server.url.rpartition(":")[2])
    body = json.dumps(SMALL).encode()
    head = (
        "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with ThreadPoolExecutor(2) as pool:
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(head.encode() + body)
            wait_until(lambda: server.metric("klein_requests_running") == 1)
            jobs = [pool.submit(answer_of, server) for _ in range(2)]
            wait_until(lambda: server.metric("klein_requests_running") == 3)
        wait_until(lambda: server.metric("klein_requests_running") == 2)
        gate.touch()
        assert [job.result() for job in jobs] == [200, 200]

    assert sorted(trace.read_text().split("\n")[:-1]) == ["finished", "finished", "stopped 1"]
