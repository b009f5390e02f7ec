"""The model of the queue against formulas, against its page, and against services that run."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from benchmarks import queueing
from benchmarks.queueing import BURST, REFUSED, Bounds, arrival_times, one_queue, replicas
from tests.support.chaos import Answer, ask, port_of, request_bytes
from tests.support.proxies import PAGE, behind, wait_until
from tests.support.server import ROOT
from tests.support.several import devices

ENDLESS = Bounds(queue_images=10**9, deadline_s=1e9)


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_one_card_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """With Poisson arrivals and pictures of one kind: load / (2 (1 - load)) pictures, M/D/1."""
    times = arrival_times(load, 40_000, burst=1)
    waits = one_queue(times, [1.0] * len(times), 1, ENDLESS)

    assert mean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def test_a_mix_waits_as_its_variance_says() -> None:
    """Half of the pictures take 0.5 s and half 1.5 s: rate E[S^2] / (2 (1 - load)), M/G/1."""
    times = arrival_times(0.6, 60_000, burst=1)
    seconds = queueing.draw_seconds([0.5, 1.5], len(times))
    waits = one_queue(times, seconds, 1, ENDLESS)

    assert mean(waits) == pytest.approx(0.6 * (0.25 + 2.25) / 2 / (2 * 0.4), rel=0.05)


def test_a_burst_waits_for_itself() -> None:
    """Four at a time, far apart: they wait for none, one, two and three pictures on one card, and
    not at all on four; each way of several cards gives the same."""
    times = [moment * 100.0 for moment in range(50) for _ in range(BURST)]
    seconds = [1.0] * len(times)
    for layout in (one_queue, replicas):
        assert layout(times, seconds, 1, ENDLESS) == [0.0, 1.0, 2.0, 3.0] * 50
        assert layout(times, seconds, 2, ENDLESS) == [0.0, 0.0, 1.0, 1.0] * 50
        assert layout(times, seconds, 4, ENDLESS) == [0.0] * 200


def test_a_service_for_each_card_never_waits_less() -> None:
    """On the whole: a card may stand idle for lack of a request that another has."""
    times = arrival_times(3.4, 20_000, burst=BURST)
    seconds = queueing.draw_seconds([0.4, 1.6], len(times))
    together = one_queue(times, seconds, 4, ENDLESS)
    apart = replicas(times, seconds, 4, ENDLESS)

    assert mean(together) < mean(apart)


def test_what_has_no_place_or_no_time_is_refused() -> None:
    """Six at once, one card, two places: one is made and two wait; or as many as the deadline
    allows, a service's two cards having their places in common."""
    at_once, seconds = [0.0] * 6, [1.0] * 6
    few = Bounds(queue_images=2, deadline_s=100)
    for layout in (one_queue, replicas):
        assert layout(at_once, seconds, 1, few) == [0.0, 1.0, 2.0] + [REFUSED] * 3
    assert one_queue(at_once, seconds, 2, few).count(REFUSED) == 2
    assert replicas(at_once, seconds, 2, few).count(REFUSED) == 0
    assert one_queue(at_once, seconds, 1, Bounds(100, deadline_s=4.5)).count(REFUSED) == 2
    assert queueing.share_within([0.0, 1.0, REFUSED, REFUSED], 1.0) == 0.5


def test_the_seed_decides() -> None:
    """The same arrivals each time, on the machines of all."""
    assert arrival_times(1.0, 3, burst=1) == arrival_times(1.0, 3, burst=1)
    assert arrival_times(1.0, 3, burst=1) != arrival_times(1.0, 3, burst=1, seed=1)


@pytest.mark.system
def test_the_pages_table_is_what_the_command_prints() -> None:
    """The command that stands above it."""
    page = PAGE.read_text()
    (command,) = re.findall(r"^python -m (benchmarks\.queueing .*)$", page, re.M)
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )

    assert done.stdout.count("\n") == 2 + len(queueing.CARDS), done.stderr
    assert done.stdout in page


SLOW_S = 0.4
PICTURES = 40
LOAD = 0.8
ROUNDS = 3


@dataclass(frozen=True)
class Ran:
    """What was sent to services that run, and what came of it."""

    times: list[float]
    totals: list[float]
    alone_s: float
    """Of a request while there is no other: the fastest of five."""
    each_s: float
    """Of a picture, for its card, while others wait."""


async def drive(port: int, cards: int, times: list[float]) -> Ran:
    """Measure the seconds; then send a request at each of *times*, whatever became of others."""
    data = request_bytes("/generate", {"prompt": "x", "width": 128, "height": 128})
    alone_s = min([(await ask(port, data)).seconds for _ in range(5)])
    at_once = await asyncio.gather(*(ask(port, data) for _ in range(ROUNDS * cards)))
    ends = sorted(answer.seconds for answer in at_once)
    each_s = (median(ends[-cards:]) - median(ends[:cards])) / (ROUNDS - 1)
    begun = time.monotonic()
    sent, tasks = [], []
    for moment in times:
        await asyncio.sleep(max(0.0, begun + moment - time.monotonic()))
        sent.append(time.monotonic() - begun)
        tasks.append(asyncio.create_task(ask(port, data)))
    answers: list[Answer] = await asyncio.gather(*tasks)
    assert {answer.status for answer in answers} == {200}
    return Ran(sent, [answer.seconds for answer in answers], alone_s, each_s)


def compare(port: int, layout: queueing.Layout, cards: int, burst: int) -> None:
    """At four fifths of what so many workers can make: the mean and the 95th percentile of the
    seconds from request to picture are the model's within a tenth."""
    times = arrival_times(LOAD * cards / SLOW_S, PICTURES, burst)
    ran = asyncio.run(drive(port, cards, times))
    waits = layout(ran.times, [ran.each_s] * PICTURES, cards, Bounds())
    expected = sorted(wait + ran.alone_s for wait in waits)
    measured = sorted(ran.totals)
    at = int(0.95 * PICTURES)

    assert mean(measured) == pytest.approx(mean(expected), rel=0.1), ran
    assert measured[at] == pytest.approx(expected[at], rel=0.1), ran


@pytest.mark.system
@pytest.mark.parametrize("burst", [1, BURST], ids=["Poisson", "bursts"])
@pytest.mark.parametrize("cards", [2, 4])
def test_one_service_with_several_workers_is_as_modelled(scripted, cards: int, burst: int) -> None:
    """Fed with the seconds that its workers need."""
    service = scripted(f"slow={SLOW_S}", device=f"cpu:{cards}", model="flux.2-klein-4b")
    service.wait_until_ready()
    wait_until(lambda: all(each["ready"] for each in devices(service)))
    compare(port_of(service), one_queue, cards, burst)


@pytest.mark.system
def test_services_behind_haproxy_are_as_modelled(tmp_path: Path) -> None:
    """Three of one worker each; of a burst each request goes to whoever has the fewest."""
    with behind("haproxy", tmp_path, (f"slow={SLOW_S}",)) as site:
        compare(site.port, replicas, 3, BURST)
