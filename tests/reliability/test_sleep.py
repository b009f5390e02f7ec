"""Sleep and wake from outside: nothing that was accepted is lost, whenever they are asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from app.domain import Loss
from app.engine.models.registry import find_model
from tests.e2e.test_service import wait_until
from tests.support.server import Server
from tests.support.several import WITH_SEVERAL, count_of
from tests.support.timing import TIMED

SMALL = {"prompt": "x", "width": 128, "height": 128}

pytestmark = pytest.mark.slow


def ask(server: Server, path: str) -> dict:
    """What POST *path* answers."""
    status, _, body = server.post(path, {})
    assert status == 200, body
    return json.loads(body)


def state(server: Server) -> str:
    """The state in one word, which /health/ready tells too."""
    said = json.loads(server.get("/is_sleeping")[2])
    assert said["is_sleeping"] == (said["state"] in ("asleep", "yielding"))
    return said["state"]


def fall_asleep(server: Server) -> None:
    """Ask for it, and wait until no worker is there."""
    ask(server, "/sleep")
    wait_until(lambda: not server.worker_pids())
    assert state(server) == "asleep"


def wakes(server: Server) -> list[float]:
    """How many times each worker has woken for a request."""
    return [
        float(line.rsplit(" ", 1)[1])
        for line in server.get("/metrics")[2].decode().splitlines()
        if line.startswith('klein_worker_wakes_total{cause="request"')
    ]


def make(server: Server, _: object = None) -> int:
    """The status of a picture."""
    return server.post("/generate", SMALL)[0]


@WITH_SEVERAL
def test_a_request_wakes_what_sleeps(scripted, device: str) -> None:
    """Twenty at once are admitted, wait, and get their pictures from one load of each worker."""
    server = scripted("load=0.3", device=device)
    server.wait_until_ready()
    assert make(server) == 200
    fall_asleep(server)
    ready, _, body = server.get("/health/ready")
    assert (ready, json.loads(body)["state"]) == (200, "asleep")
    assert server.metric("klein_ready") == 1
    assert server.metric("klein_worker_asleep") == count_of(device)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda number: make(server, number), range(20))) == [200] * 20
    wait_until(lambda: wakes(server) == [1.0] * count_of(device))
    assert server.metric("klein_worker_restarts_total", reason="startup") == 0


@WITH_SEVERAL
def test_a_stream_tells_that_it_waits_for_a_wake(scripted, device: str) -> None:
    """With the seconds that the last one took, in a comment, before the first step; never else."""
    server = scripted("load=0.3", device=device)
    server.wait_until_ready()
    body = {"prompt": "x", "size": "128x128", "stream": True}
    told = []
    for is_asleep in (True, True, False):
        if is_asleep:
            fall_asleep(server)
        status, _, answer = server.post("/v1/images/generations", body)
        assert status == 200
        lines = answer.decode().splitlines()
        assert any(line.startswith("event: image_generation.completed") for line in lines)
        told.append([line for line in lines if line.startswith(": ")][:3])
    assert [each[0] for each in told] == [": queued 0"] * 3
    assert [each[1].split()[1] for each in told] == ["waking", "waking", "denoise"]
    assert 0.25 < float(told[1][1].split()[2]) < 30
    assert told[1][2].startswith(": denoise 1/")


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.system)])
def test_a_request_at_the_very_moment_of_sleep(scripted, times: int) -> None:
    """Before, while and after the worker goes: each gets its picture."""
    server = scripted(queue_images=200)
    server.wait_until_ready()
    with ThreadPoolExecutor(2) as pool:
        for number in range(times):
            asleep = pool.submit(ask, server, "/sleep")
            time.sleep(number % 10 / 1000)
            assert make(server) == 200
            asleep.result()
    assert server.metric("klein_worker_wakes_total", cause="request") >= times // 10
    server.stop()


def test_what_runs_is_finished_first(scripted, tmp_path: Path) -> None:
    """And what waits too; the answer says that it sleeps afterwards."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}")
    server.wait_until_ready()
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(make, server) for _ in range(3)]
        wait_until(lambda: server.metric("klein_queue_size") == 2)
        said = ask(server, "/sleep")
        assert said["is_sleeping"] is False
        assert "as soon as" in said["message"]
        gate.touch()
        assert [each.result() for each in running] == [200] * 3
    wait_until(lambda: state(server) == "asleep")


@pytest.mark.full
def test_asked_for_at_odd_moments(scripted) -> None:
    """During the load, twice, while waking, and while it leaves: each is done as it was said."""
    server = scripted("load=0.5")
    wait_until(lambda: server.get("/health/live")[0] == 200)
    ask(server, "/sleep")
    wait_until(lambda: state(server) == "asleep")
    ask(server, "/sleep")
    assert ask(server, "/wake")["state"] == "waking"
    ask(server, "/wake_up")
    assert ask(server, "/sleep")["state"] == "waking"
    wait_until(lambda: state(server) == "asleep")
    assert server.metric("klein_worker_wakes_total", cause="asked") == 1
    ask(server, "/wake")
    wait_until(lambda: state(server) == "ready")
    ask(server, "/sleep")
    ask(server, "/wake")
    wait_until(lambda: state(server) == "ready")
    assert server.metric("klein_worker_wakes_total", cause="asked") == 3


def test_a_wake_that_fails_is_said_and_tried_again(scripted, tmp_path: Path) -> None:
    """It is no restart: the service goes on, refuses with the reason, and recovers by a wake."""
    broken = tmp_path / "broken"
    server = scripted("startexit", f"once={broken}")
    broken.touch()
    server.wait_until_ready()
    fall_asleep(server)
    broken.unlink()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make, server)
        wait_until(lambda: state(server) == "yielding")
        status, headers, body = server.post("/generate", SMALL)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "could not be woken" in json.loads(body)["error"]["message"]
        assert server.get("/health/ready")[0] == 503
        assert server.metric("klein_ready") == 0
        assert server.metric("klein_worker_yielding") == 0
        ask(server, "/wake")
        assert waiting.result() == 200
    assert server.metric("klein_worker_restarts_total", reason="startup") == 0
    assert state(server) == "ready"


@pytest.mark.full
def test_files_that_are_gone_while_it_sleeps(tmp_path: Path) -> None:
    """The next wake says so: 503 without a path, the log with it, no restart; it recovers."""
    folder, away, cache = tmp_path / "model", tmp_path / "away", tmp_path / "cache"
    shutil.copytree(find_model("shapes").folder, folder)
    settings = {"variant": "shapes", "device": "cpu", "precision": "int8", "cache_dir": cache}
    with Server("--model", str(folder), **settings) as server:

        def picture() -> bytes:
            status, _, body = server.post("/generate", {**SMALL, "seed": 7})
            assert status == 200, body
            return body

        first = picture()
        kept = sorted((cache / "converted").iterdir())
        assert kept
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
        for victim, named in ((folder, folder), (vae, vae.parent)):
            fall_asleep(server)
            victim.rename(away)
            before = len(server.lines)
            ask(server, "/wake")
            wait_until(lambda: state(server) == "yielding")
            answers = [server.get("/health/ready"), server.post("/generate", SMALL)]
            if victim == folder:
                answers.append(server.post("/v1/tokens", {"prompt": "x"}))
            for status, _, body in answers:
                assert status == 503
                assert str(tmp_path).encode() not in body
                assert b"files" in body
            assert "files of its model are missing" in str(answers[0][2])
            assert f"{named}" in "".join(server.lines[before:])
            assert server.metric("klein_ready") == 0
            away.rename(victim)
            ask(server, "/wake")
            assert picture() == first
        fall_asleep(server)
        shutil.rmtree(cache / "converted")
        assert picture() == first
        assert sorted((cache / "converted").iterdir()) == kept
        for reason in Loss:
            assert server.metric("klein_worker_restarts_total", reason=reason) == 0


@WITH_SEVERAL
@pytest.mark.full
def test_idleness_puts_it_to_sleep(scripted, device: str) -> None:
    """After the time that was set, and again after the next picture."""
    server = scripted(device=device, idle_sleep_s=0.4)
    server.wait_until_ready()
    for _ in range(2):
        wait_until(lambda: state(server) == "asleep")
        assert make(server) == 200


@TIMED
def test_it_ends_at_once_while_it_sleeps(scripted, is_timed: bool) -> None:
    """SIGTERM has nothing to wait for."""
    server = scripted()
    server.wait_until_ready()
    fall_asleep(server)
    begun = time.monotonic()
    assert server.stop() == 0
    assert not is_timed or time.monotonic() - begun < 1.0


@pytest.mark.full
def test_a_cancelled_request_wakes_nobody_for_ever(scripted) -> None:
    """The worker that it woke sleeps again when it is asked to."""
    server = scripted("load=0.3", "slow=0.1", deadline_s=5)
    server.wait_until_ready()
    fall_asleep(server)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(make, server)
        wait_until(lambda: server.metric("klein_queue_size") == 1)
        (job,) = json.loads(server.get("/v1/jobs")[2])["data"]
        server.request("DELETE", f"/v1/jobs/{job['id']}")
    wait_until(lambda: state(server) == "ready")
    fall_asleep(server)


@pytest.mark.full
def test_the_wait_is_predicted_with_the_wake(scripted) -> None:
    """`/health` and Retry-After know how long the last load took."""
    server = scripted("load=1.5")
    server.wait_until_ready()
    fall_asleep(server)
    assert make(server) == 200
    fall_asleep(server)
    waits = json.loads(server.get("/health")[2])["queue"]["estimated_wait_s"]
    assert 1.4 < waits < 10


@pytest.mark.full
def test_a_killed_worker_is_back_awake(scripted) -> None:
    """A death is not sleep; what sleeps cannot die."""
    server = scripted()
    server.wait_until_ready()
    fall_asleep(server)
    assert make(server) == 200
    os.kill(server.worker_pid(), signal.SIGKILL)
    wait_until(lambda: server.metric("klein_worker_restarts_total", reason="killed") == 1)
    wait_until(lambda: state(server) == "ready")


@pytest.mark.system
def test_a_hundred_cycles_keep_nothing(scripted) -> None:
    """Host memory, descriptors and threads stay, and the same seed gives the same picture."""
    server = scripted()
    server.wait_until_ready()
    process = psutil.Process(server.process.pid)
    pictures, held = set(), []
    for _ in range(100):
        pictures.add(server.post("/generate", {**SMALL, "seed": 7})[2])
        fall_asleep(server)
        held.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    assert len(pictures) == 1
    # The least of ten: what two processes shared, 16 MB, is freed a moment after one has gone.
    before, after = (list(map(min, zip(*part, strict=True))) for part in (held[10:20], held[-10:]))
    assert after[0] <= 1.01 * before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2]
