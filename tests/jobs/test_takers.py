"""Several devices take from one queue: alike, of unequal size, of unequal speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from app.domain import Device, ImageSpec
from app.errors import Kind, Unavailable
from app.jobs.dispatcher import Dispatcher
from app.jobs.estimate import Estimates
from app.jobs.job import Job
from app.jobs.queue import JobQueue
from app.jobs.taker import Taker
from tests.jobs.conftest import SPEC, generated

LARGE = replace(SPEC, width=2 * SPEC.width, height=2 * SPEC.height)


class Clock:
    """Stands until it is set."""

    s = 0.0

    def __call__(self) -> float:
        return self.s


def card(
    seconds: float,
    most_pixels: int = 4 * SPEC.pixels,
    *,
    is_ready: Callable[[], bool] = lambda: True,
) -> Taker:
    """A device that takes *seconds* for a picture, and has room for so many pixels."""
    return Taker(
        device=Device(0, "RTX", f"GPU-{seconds}"),
        is_ready=is_ready,
        fits=lambda spec: spec.pixels <= most_pixels,
        predict_s=lambda spec: seconds,
        speed=lambda: 1.0 / seconds,
        room=lambda: most_pixels,
    )


def jobs(client: str, count: int, spec: ImageSpec = SPEC, *, seconds: float = 1.0) -> list[Job]:
    """Pictures of one client."""
    loop = asyncio.get_running_loop()
    return [
        Job(f"{client}{n}", spec, client, 1e9, loop.create_future(), predicted_s=seconds)
        for n in range(count)
    ]


async def settle() -> None:
    """Let everything happen that is due."""
    for _ in range(4):
        await asyncio.sleep(0)


async def taken(queue: JobQueue, taker: Taker) -> Job | None:
    """What *taker* gets now; None where it leaves all that wait to others."""
    task = asyncio.create_task(queue.take(taker))
    await settle()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def finish(queue: JobQueue, job: Job) -> None:
    """Its device is done with it."""
    job.succeed(generated(job.spec))
    queue.finish(job)


async def test_each_idle_device_takes_one() -> None:
    """Three idle devices take three of five pictures at once, and places count accordingly."""
    takers = [card(1.0) for _ in range(3)]
    queue = JobQueue(2, takers, clock=Clock())
    taking = [asyncio.create_task(queue.take(each)) for each in takers]
    await settle()
    queue.submit(jobs("a", 5), retry_after_s=1)
    with pytest.raises(Unavailable):
        queue.submit(jobs("a", 1), retry_after_s=1)

    assert {job.id for job in await asyncio.gather(*taking)} == {"a0", "a1", "a2"}
    assert repr(queue) == "<JobQueue 2 of 2 waiting, 3 running>"
    assert [len(each.running) for each in takers] == [1, 1, 1]


async def test_a_worker_that_is_not_ready_takes_nothing() -> None:
    """A job does not wait for the restart of one worker while another is idle."""
    is_up = [False]
    down, up = card(1.0, is_ready=lambda: is_up[0]), card(1.0)
    queue = JobQueue(8, [down, up], clock=Clock())
    queue.submit(jobs("a", 2), retry_after_s=1)
    waiting = asyncio.create_task(queue.take(down))
    await settle()

    assert not waiting.done()
    assert (await taken(queue, up)).id == "a0"
    is_up[0] = True
    queue.look_again()
    assert (await waiting).id == "a1"


async def test_a_large_job_goes_only_where_it_fits_and_the_small_card_is_not_starved() -> None:
    """The small card takes the first job that fits it, whatever waits before."""
    small, large = card(1.0, SPEC.pixels), card(1.0)
    queue = JobQueue(8, [small, large], clock=Clock())
    queue.submit(jobs("a", 2, LARGE), retry_after_s=1)
    queue.submit(jobs("b", 2), retry_after_s=1)

    assert (await taken(queue, small)).id == "b0"
    assert (await taken(queue, large)).id == "a0"
    small.running.clear()
    assert (await taken(queue, small)).id == "b1"
    small.running.clear()
    assert await taken(queue, small) is None
    large.running.clear()
    assert (await taken(queue, large)).id == "a1"


async def test_small_pictures_made_elsewhere_cost_a_client_no_turn_on_the_large_card() -> None:
    """Between two clients the large card alternates, so no large picture waits for ever."""
    small, large = card(1.0, SPEC.pixels), card(1.0)
    queue = JobQueue(32, [small, large], clock=Clock())
    queue.submit(jobs("a", 1, LARGE) + jobs("a", 6), retry_after_s=1)
    queue.submit(jobs("b", 7), retry_after_s=1)
    order = []
    for taker in [small, large] * 3:
        order.append((await taken(queue, taker)).id)
        taker.running.clear()

    assert order.index("a0") <= 3


async def test_a_slow_card_leaves_a_job_to_a_fast_one_that_is_sooner_done() -> None:
    """Busy for another second, the fast card still ends it before the slow one would."""
    clock = Clock()
    fast, slow = card(1.0), card(5.0)
    queue = JobQueue(8, [slow, fast], clock=clock)
    queue.submit(jobs("a", 2), retry_after_s=1)
    first = await taken(queue, fast)

    assert first.id == "a0"
    assert await taken(queue, slow) is None
    clock.s = 1.0
    finish(queue, first)
    assert (await taken(queue, fast)).id == "a1"


async def test_a_slow_card_takes_what_would_wait_longer_for_the_fast_one() -> None:
    """Of seven jobs the sixth: five go through the fast card before the slow one ends its first."""
    fast, slow = card(1.0), card(5.5)
    queue = JobQueue(8, [slow, fast], clock=Clock())
    queue.submit(jobs("a", 7), retry_after_s=1)
    assert (await taken(queue, fast)).id == "a0"

    assert (await taken(queue, slow)).id == "a5"


async def test_what_is_left_to_a_card_that_hangs_is_taken_after_a_while() -> None:
    """It is as late again as it is late; the slow card looks again without being told."""
    clock = Clock()
    fast, slow = card(1.0), card(5.0)
    queue = JobQueue(8, [slow, fast], clock=clock)
    queue.submit(jobs("a", 2), retry_after_s=1)
    await taken(queue, fast)
    waiting = asyncio.create_task(queue.take(slow))
    await settle()
    assert not waiting.done()
    clock.s = 6.0

    assert (await asyncio.wait_for(waiting, 2)).id == "a1"


async def test_the_wait_is_that_of_all_devices_together() -> None:
    """Eight seconds of work: four for two alike; for a second card of half the speed, more."""
    clock = Clock()
    for takers, wait_s, span_s in (
        ([card(1.0)], 8.0, 8.0),
        ([card(1.0), card(1.0)], 4.0, 4.5),
        ([card(1.0), card(2.0)], 8 / 1.5, 8 / 1.5 + 1 / 3),
    ):
        queue = JobQueue(8, takers, clock=clock)
        queue.submit(jobs("a", 8), retry_after_s=1)

        assert queue.expected_wait_s() == pytest.approx(wait_s)
        assert queue.span_s([1.0] * 8) == pytest.approx(span_s)


async def test_while_a_device_is_idle_nobody_waits() -> None:
    """One of two is busy for ten seconds: a picture waits 0 s, and behind two of 4 s, 8 s."""
    queue = JobQueue(8, [Taker(), Taker()], clock=Clock())
    queue.submit(jobs("a", 1, seconds=10.0), retry_after_s=1)
    await taken(queue, queue.takers[0])

    assert queue.expected_wait_s() == 0.0
    queue.submit(jobs("a", 2, seconds=4.0), retry_after_s=1)
    assert queue.expected_wait_s() == 8.0
    queue.submit(jobs("a", 1, seconds=4.0), retry_after_s=1)
    assert queue.expected_wait_s() == 11.0


async def test_one_long_picture_is_not_expected_sooner_for_many_devices() -> None:
    """Four idle devices make a picture of ten seconds in ten."""
    queue = JobQueue(8, [card(1.0) for _ in range(4)])

    assert queue.span_s([10.0]) == 10.0
    with pytest.raises(Unavailable):
        queue.check_time("a", [10.0], 9.0, retry_after_s=1, has_claim=False)


async def test_what_only_a_lost_card_could_make_is_refused_and_the_rest_goes_on() -> None:
    """With the large card left out, its picture fails at once; the small one's are made."""
    small, large = card(1.0, SPEC.pixels), card(1.0)
    queue = JobQueue(8, [small, large])
    (big,), (little,) = jobs("a", 1, LARGE), jobs("b", 1)
    queue.submit([big], retry_after_s=1)
    queue.submit([little], retry_after_s=1)
    queue.drop(large, Unavailable("gone", kind=Kind.WORKER_DOWN))

    with pytest.raises(Unavailable, match="gone"):
        await big.future
    assert (await taken(queue, small)) is little


def test_speeds_are_relative_to_the_fastest() -> None:
    """A card that takes twice as long has half the speed; an unknown one counts as fast."""
    estimates = Estimates(SPEC)
    estimates.of("fast").learn(SPEC, 1.0)
    estimates.of("slow").learn(SPEC, 2.0)

    assert estimates.predict(SPEC) == pytest.approx(1.0)
    assert estimates.speed("fast") == pytest.approx(1.0)
    assert estimates.speed("slow") == pytest.approx(0.5)
    estimates.of("new")
    assert estimates.speed("new") == 1.0


class Instant:
    """A worker that makes a picture in no time."""

    async def wait_until_ready(self) -> None:
        """It is."""

    async def run(self, job_id, spec, on_progress):
        """Make one."""
        return generated(spec)


async def through(count: int, workers: int) -> float:
    """Seconds for each of *count* jobs through so many workers."""
    takers = [card(0.0001) for _ in range(workers)]
    queue = JobQueue(count, takers)
    estimates = Estimates(SPEC)
    tasks = [
        asyncio.create_task(Dispatcher(queue, Instant(), estimates.of("one"), each).run())
        for each in takers
    ]
    await settle()
    new = [job for client in "abcd" for job in jobs(client, count // 4, seconds=0.0001)]
    started = time.perf_counter()
    queue.submit(new, retry_after_s=1)
    await queue.wait_until_empty()
    took_s = time.perf_counter() - started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(job.future.result() for job in new)
    return took_s / count


@pytest.mark.system
async def test_four_workers_cost_the_queue_little_more_than_one() -> None:
    """Ten thousand jobs: at most 0.2 ms more for each."""
    assert await through(10_000, 4) < await through(10_000, 1) + 0.0002
