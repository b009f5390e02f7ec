"""Under Ray Serve, for real: what passes, what answers, and what is lost when something dies."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.support.greedy import ASKS, KEYS, PICTURE_S, beside_greedy
from tests.support.ray_cluster import PORT, Answer, Cluster, ask, generate, wait_until
from tests.support.server import ROOT, Server

pytestmark = pytest.mark.system
_log = logging.getLogger(__name__)

STEP_S = 0.2
SLOW_S = 4 * STEP_S
ALIKE_S = 0.05
CANCEL_S = STEP_S + 0.25
TWO = ("--replicas", "2", "--cores", "2")
PLACES = 4 + 1
"""Of one replica: those that wait, and the one that runs."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    """Gets a line at each end of a picture, whichever replica made it."""
    return tmp_path_factory.mktemp("trace") / "trace"


@pytest.fixture(scope="module")
def gate(trace) -> Path:
    """Pictures go on while it is there."""
    gate = trace.with_name("gate")
    gate.touch()
    return gate


@pytest.fixture(scope="module")
def serving(cluster, trace, gate) -> Cluster:
    """Two replicas that take 0.2 s for a step."""
    cluster.deploy(f"slow={SLOW_S}, previews=1, 'trace={trace}', 'gate={gate}'", *TWO)
    cluster.wait_for(2)
    return cluster


@pytest.fixture
def two(serving, gate) -> Iterator[Cluster]:
    """Both replicas are ready, before and after."""
    gate.touch()
    serving.wait_for(2)
    wait_until(lambda: both_answer(serving))
    yield serving
    gate.touch()


def both_answer(cluster: Cluster) -> bool:
    """Whether each of two replicas says that it is ready."""
    answers = [ask("GET", "/health/ready") for _ in range(4)]
    return {each.status for each in answers} == {200} and len({e.pid for e in answers}) == 2


def lines(trace: Path) -> list[str]:
    """What has ended so far."""
    return trace.read_text().splitlines() if trace.exists() else []


@contextmanager
def streaming(seed: int) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPResponse]]:
    """A stream with three previews."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    body = {"prompt": "a fox", "seed": seed, "stream": True, "partial_images": 3, "size": "256x256"}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
    try:
        yield connection, connection.getresponse()
    finally:
        connection.close()


def event(answer: http.client.HTTPResponse) -> str | None:
    """The name of the next event; None at the end."""
    while line := answer.readline():
        if line.startswith(b"event:"):
            return line.split(b":", 1)[1].strip().decode()
    return None


def watch(seed: int) -> list[float]:
    """Seconds between the events of a stream."""
    came = []
    with streaming(seed) as (_, answer):
        assert answer.status == 200
        while name := event(answer):
            came.append((name, time.monotonic()))
    names = [name for name, _ in came]
    assert names == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    return [after - before for (_, before), (_, after) in pairwise(came)]


def test_events_pass_one_by_one(two) -> None:
    """Each comes a step after the one before, not all at the end: medians of five streams."""
    gaps = [statistics.median(each) for each in zip(*map(watch, range(5)), strict=True)]

    assert [gap for gap in gaps if abs(gap - STEP_S) > ALIKE_S] == []


def test_a_client_that_goes_away_stops_its_picture(two, trace) -> None:
    """At the next step."""
    before = len(lines(trace))
    with streaming(2) as (connection, answer):
        assert event(answer)
        assert connection.sock is not None
    left = time.monotonic()
    wait_until(lambda: len(lines(trace)) > before)

    assert lines(trace)[before].startswith("stopped")
    assert time.monotonic() - left < CANCEL_S


def test_a_full_queue_is_refused_by_the_service_itself(two, gate) -> None:
    """What both replicas hold is made, all else gets our 503; probes pass meanwhile."""
    gate.unlink()
    too_many = 2 * PLACES + 6
    with ThreadPoolExecutor(too_many) as pool:
        asked = [pool.submit(generate, seed) for seed in range(too_many)]
        wait_until(lambda: sum(each.done() for each in asked) >= 6)
        probes = [ask("GET", "/health/ready").status for _ in range(8)]
        gate.touch()
        answers = [each.result() for each in asked]

    assert Counter(each.status for each in answers) == {200: 2 * PLACES, 503: 6}
    assert probes == [200] * 8
    for each in answers:
        if each.status == 503:
            assert json.loads(each.body)["error"]["code"] == "server_is_overloaded"
            assert int(each.headers["retry-after"]) >= 1


def held(cluster: Cluster, pool: ThreadPoolExecutor) -> list:
    """One picture on each of two replicas, both held at the gate."""
    asked = [pool.submit(generate, seed) for seed in range(2)]
    wait_until(lambda: sorted(cluster.running().values()) == [1, 1])
    return asked


def test_a_killed_worker_costs_its_one_picture(two, gate) -> None:
    """The refusals of its replica attract no traffic: they are tried at the other one. Not so what
    HAProxy had begun to pass on before it was complete, as the guide says."""
    gate.unlink()
    with ThreadPoolExecutor(2) as pool:
        asked = held(two, pool)
        two.worker(next(iter(two.running()))).kill()
        wait_until(lambda: any(each.done() for each in asked))
        in_two = generate(is_in_two=True)
        gate.touch()
        others = [generate(seed).status for seed in range(10)]
        answers = [each.result() for each in asked]

    assert sorted(each.status for each in answers) == [200, 500]
    assert others == [200] * 10
    assert (in_two.status, json.loads(in_two.body)["error"]["code"]) == (503, "model_loading")
    assert int(in_two.headers["retry-after"]) >= 1


def test_a_killed_replica_costs_what_it_was_making(two, gate) -> None:
    """Its worker ends by itself, and Serve starts another replica."""
    gate.unlink()
    with ThreadPoolExecutor(2) as pool:
        asked = held(two, pool)
        victim = next(iter(two.running()))
        orphan = two.worker(victim)
        os.kill(victim, 9)
        gone_s = wait_until(lambda: not orphan.is_running() or orphan.status() == "zombie")
        wait_until(lambda: any(each.done() for each in asked))
        gate.touch()
        others = [generate(seed).status for seed in range(10)]
        answers = [each.result() for each in asked]

    assert Counter(each.status == 200 for each in answers) == {True: 1, False: 1}
    assert others == [200] * 10
    _log.info("the orphan was gone after %.2f s", gone_s)
    assert gone_s < 2


def test_what_listens_is_what_the_guide_says(two) -> None:
    """Its table is the whole of it, and says which of them other machines reach."""
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("<!-- ports -->")[1]
    rows = [[cell.strip(" `") for cell in row.split("|")[1:4]] for row in table.splitlines()]
    told = {tuple(row) for row in rows if len(row) == 3 and row[0] not in {"process", "---"}}
    # The kernel keeps 15 letters of a name.
    names = {name[:15]: name for name, _, _ in told}
    fixed = {port for _, _, port in told if port.isdigit()}

    def as_told(name: str, address: str, port: str) -> tuple[str, str, str]:
        name = "python" if name.startswith("python") else names.get(name, name)
        place = "all" if address in {"0.0.0.0", "*", "::"} else "the node's"
        if name == "ray::ServeReplica" and 30_000 <= int(port) <= 31_000:
            return name, place, "30000 to 31000"
        return name, place, port if port in fixed else "any"

    # A process that Ray keeps for the next task comes and goes.
    found = {as_told(*each) for each in two.listening() if not each[0].startswith("ray::IDLE")}
    assert found == told


DRIVER = "import ray; ray.init('127.0.0.1:6379'); print(ray.get(ray.remote(lambda: 1).remote()))"


@pytest.mark.parametrize(
    ("environ", "is_let_in"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "not-the-token-of-this-cluster-but-as-long-as-that-one-is-ok"}, False),
    ],
    ids=["token", "no token", "another token"],
)
def test_a_driver_needs_the_token(two, environ, is_let_in) -> None:
    """Without it nobody who reaches the ports runs anything here."""
    done = two.ray("python", "-c", DRIVER, **environ)

    assert (done.returncode == 0 and done.stdout.strip() == "1") == is_let_in, done.stderr[-2000:]


def test_prometheus_is_told_of_each_replica(two, tmp_path) -> None:
    """Each answers its own scrape at its own address."""
    file = tmp_path / "klein.json"
    done = two.ray("python", "-m", "app", "cluster", "targets", "-o", str(file))
    assert done.returncode == 0, done.stderr
    entries = json.loads(file.read_text())

    assert len({each["labels"]["replica"] for each in entries}) == 2
    answers = [
        ask("GET", "/metrics", port=int(each["targets"][0].rpartition(":")[2])) for each in entries
    ]
    assert all(b"klein_queue_size" in each.body for each in answers)
    assert len({each.pid for each in answers}) == 2


def test_the_proxy_costs_little(two, monkeypatch) -> None:
    """At 1024x1024 at most 5 ms more than the service alone, by medians of the same run."""
    # Forked services are in the network of the one that was there first.
    monkeypatch.setattr(Server, "fork_server", None)
    settings = {"model": "flux.2-klein-4b", "device": "cpu"}
    body = {"prompt": "a fox", "width": 1024, "height": 1024}
    alone, behind = [], []
    module = "tests.support.scripted_engine"
    with Server(f"slow={SLOW_S}", "previews=1", module=module, **settings) as service:
        port = int(service.url.rpartition(":")[2])
        for seed in range(36):
            for place, seconds in ((port, alone), (PORT, behind)):
                begun = time.monotonic()
                assert ask("POST", "/generate", body | {"seed": seed}, port=place).status == 200
                seconds.append(time.monotonic() - begun)

    added_ms = 1000 * (statistics.median(behind) - statistics.median(alone))
    _log.info("HAProxy and Serve add %.1f ms", added_ms)
    assert added_ms <= 5


@contextmanager
def load(clients: int = 2) -> Iterator[list[Answer]]:
    """Ask all the time; the list grows."""
    answers: list[Answer] = []
    ending = threading.Event()

    def keep_asking(seed: int) -> None:
        while not ending.is_set():
            answers.append(generate(seed))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(keep_asking, seed) for seed in range(clients)]
        try:
            yield answers
        finally:
            ending.set()
            for each in asking:
                each.result()


def test_a_rolling_update_fails_nothing(two, trace, gate) -> None:
    """Two clients ask all the time while both replicas are replaced."""
    before = {each.pid for each in two.replicas()}
    script = f"slow={SLOW_S}, 'trace={trace}', 'gate={gate}'"
    with load() as answers:
        two.deploy(script, *TWO, KLEIN_LOG_LEVEL="warning")
        wait_until(lambda: not before & {each.pid for each in answers[-4:] if each.status}, 120)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 120)
        two.wait_for(2)
        asked = len(answers)
        wait_until(lambda: len(answers) >= asked + 8)

    _log.info("%d answers", len(answers))
    assert Counter(each.status for each in answers) == {200: len(answers)}


def test_a_killed_haproxy_comes_back(two) -> None:
    """Nothing is answered meanwhile; the replicas are the same as before."""
    before = {each.pid for each in two.replicas()}
    for each in two.haproxy():
        each.kill()
    back_s = wait_until(lambda: ask("GET", "/health/ready").status == 200)

    _log.info("HAProxy was away for %.1f s", back_s)
    assert {each.pid for each in two.replicas()} == before
    assert generate().status == 200


def test_from_zero_the_first_requests_wait(cluster, gate) -> None:
    """As many as there are places get their picture, others 503 with the seconds of a start."""
    gate.touch()
    words = ("--cores", "2", "--replicas", "1", "--min-replicas", "0", "--start-seconds", "7")
    cluster.deploy(f"slow={SLOW_S}, load=1", *words)
    wait_until(lambda: not cluster.replicas(), 180)
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(generate, range(10))]

    counted = Counter(each.status for each in answers)
    assert set(counted) == {200, 503}
    assert counted[200] >= 4
    refused = [each for each in answers if each.status == 503]
    assert {each.headers.get("retry-after") for each in refused} == {"7"}


def test_more_replicas_are_rolled_out_beside_an_old_one(cluster) -> None:
    """From one on a node to two: the new ones do not wait for the old one's end."""
    before = {each.pid for each in cluster.replicas()}
    assert len(before) == 1
    cluster.deploy(f"slow={SLOW_S}", *TWO)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 60)
    cluster.wait_for(2)


def test_each_replica_is_fair(cluster, gate, tmp_path) -> None:
    """A picture each 0.4 s by each of two: who asks politely is served beside 24 sockets that never
    stop, at the median within three pictures' time, its own included."""
    gate.touch()
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    before = {each.pid for each in cluster.replicas()}
    settings = {"KLEIN_API_KEYS_FILE": str(keys), "KLEIN_QUEUE_IMAGES": "8"}
    cluster.deploy(f"slow={PICTURE_S}", *TWO, **settings)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), 120)
    cluster.wait_for(2)
    polite, greedy = asyncio.run(beside_greedy(PORT))
    served = sorted(answer.seconds for answer in polite if answer.status == 200)

    made = sum(answer.status == 200 for answer in greedy)
    _log.info("%s; %d of %d", [round(each, 2) for each in served], made, len(greedy))
    assert {answer.status for answer in polite + greedy} <= {200, 503}
    assert len(served) >= ASKS - 1
    assert served[len(served) // 2] < 3 * PICTURE_S
