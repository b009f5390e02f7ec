"""Nothing is left behind, wherever a caller leaves or a taker is cancelled."""

import asyncio

import pytest

from app.errors import Cancelled
from app.jobs.job import JobState
from app.jobs.queue import JobQueue


async def test_a_waiting_job_is_gone_at_once(make_jobs) -> None:
    """A caller who leaves frees the place and the job never runs."""
    queue = JobQueue(2)
    (job,) = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)

    queue.cancel(job)

    assert repr(queue) == "<JobQueue 0 of 2 waiting, 0 running>"
    assert isinstance(job.future.exception(), Cancelled)


async def test_a_running_job_is_asked_to_stop_once(make_jobs) -> None:
    """Leaving twice stops once; the job counts as running until the card is free."""
    queue = JobQueue(2)
    (job,) = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)
    await queue.take()
    stops = []
    job.cancel_running = lambda: stops.append(1)

    queue.cancel(job)
    queue.cancel(job)

    assert stops == [1]
    assert repr(queue) == "<JobQueue 0 of 2 waiting, 1 running>"


async def test_a_cancelled_taker_leaves_the_queue_whole(make_jobs) -> None:
    """Cancelled while it waits, it takes nothing with it."""
    queue = JobQueue(2)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    queue.submit(make_jobs(["a1"]), retry_after_s=1)

    assert repr(queue) == "<JobQueue 1 of 2 waiting, 0 running>"


async def test_a_taker_cancelled_as_it_is_served_gives_the_job_back(make_jobs) -> None:
    """Cancelled between the giving and its waking, the job is first in line again."""
    queue = JobQueue(2)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    (job,) = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    assert job.state is JobState.WAITING
    assert (await queue.take()) is job


async def test_leaving_after_the_answer_changes_nothing(make_jobs) -> None:
    """A result that is there stays there."""
    queue = JobQueue(2)
    (job,) = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)
    await queue.take()
    job.future.set_result(None)
    queue.finish(job)

    queue.cancel(job)

    assert job.future.result() is None
