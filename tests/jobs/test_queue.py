"""The queue's state, told by its repr."""

import asyncio

import pytest

from app.errors import Cancelled, DeadlineExceeded, Kind, Unavailable
from app.jobs.queue import JobQueue


async def test_a_request_gets_all_its_places_or_none(make_jobs) -> None:
    """Three images do not fit into two places, and none of them is kept."""
    queue = JobQueue(2)

    with pytest.raises(Unavailable) as refused:
        queue.submit(make_jobs(["a1", "a2", "a3"]), retry_after_s=7)

    assert (refused.value.kind, refused.value.retry_after_s) == (Kind.QUEUE_FULL, 7)
    assert repr(queue) == "<JobQueue 0 of 2 waiting, 0 running>"


async def test_a_running_image_holds_no_place(make_jobs) -> None:
    """What the card works on does not count against the bound."""
    queue = JobQueue(1)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.submit(make_jobs(["a1"]), retry_after_s=1)
    queue.submit(make_jobs(["a2"]), retry_after_s=1)

    assert (await taking).id == "a1"
    assert repr(queue) == "<JobQueue 1 of 1 waiting, 1 running>"


async def test_an_idle_card_adds_a_place(make_jobs) -> None:
    """With the taker waiting, a queue of two takes three at once."""
    queue = JobQueue(2)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.submit(make_jobs(["a1", "a2", "a3"]), retry_after_s=1)

    assert (await taking).id == "a1"
    assert repr(queue) == "<JobQueue 2 of 2 waiting, 1 running>"


async def test_a_job_past_its_deadline_never_runs(make_jobs) -> None:
    """It is answered at its deadline and leaves the queue."""
    queue = JobQueue(2)
    (job,) = make_jobs(["a1"], deadline_s=0.01)
    queue.submit([job], retry_after_s=1)

    with pytest.raises(DeadlineExceeded):
        await job.future
    assert repr(queue) == "<JobQueue 0 of 2 waiting, 0 running>"


async def test_a_finished_queue_is_empty(make_jobs) -> None:
    """`wait_until_empty` returns when the last running job is done."""
    queue = JobQueue(2)
    queue.submit(make_jobs(["a1"]), retry_after_s=1)
    job = await queue.take()
    emptied = asyncio.create_task(queue.wait_until_empty())
    await asyncio.sleep(0)
    assert not emptied.done()

    queue.finish(job)

    await emptied
    assert repr(queue) == "<JobQueue 0 of 2 waiting, 0 running>"


async def test_the_expected_wait_is_the_sum_of_what_is_left(make_jobs) -> None:
    """Two waiting and one running job, predicted at two seconds each, make six."""
    queue = JobQueue(3)
    queue.submit(make_jobs(["a1", "a2", "a3"]), retry_after_s=1)
    await queue.take()

    assert queue.expected_wait_s() == pytest.approx(6.0, abs=0.5)


async def test_a_picture_that_has_left_the_device_delays_nobody(make_jobs) -> None:
    """A device that asks for the next job is free, though its last picture was faster than
    predicted and is still being transferred."""
    clock = [0.0]
    queue = JobQueue(10, clock=lambda: clock[0])
    [job] = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)
    await queue.take()
    clock[0] = 0.5

    assert queue.expected_wait_s() == 1.5

    asking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)

    assert queue.expected_wait_s() == 0.0

    asking.cancel()


async def test_failing_what_waits_answers_everyone(make_jobs) -> None:
    """At shutdown nobody is left without an answer."""
    queue = JobQueue(3)
    jobs = make_jobs(["a1", "b1"])
    queue.submit(jobs, retry_after_s=1)

    queue.fail_waiting(Cancelled())

    assert [type(job.future.exception()) for job in jobs] == [Cancelled, Cancelled]
    assert repr(queue) == "<JobQueue 0 of 3 waiting, 0 running>"
