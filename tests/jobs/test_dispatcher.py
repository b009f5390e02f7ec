"""One job on the card at a time, each settled once."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from app.errors import Cancelled, GenerationFailed, WorkerLost
from app.jobs.dispatcher import Dispatcher
from app.jobs.estimate import Estimator
from app.jobs.queue import JobQueue
from tests.jobs.conftest import SPEC, ScriptedBackend


@asynccontextmanager
async def dispatching(capacity: int = 4):
    """A queue, a backend and a running dispatcher."""
    queue, backend, estimator = JobQueue(capacity), ScriptedBackend(), Estimator()
    task = asyncio.create_task(Dispatcher(queue, backend, estimator).run())
    try:
        yield queue, backend, estimator
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_the_next_job_starts_when_the_card_is_free(make_jobs) -> None:
    """The second starts while the first one's pixels are still on their way."""
    async with dispatching() as (queue, backend, _):
        first, second = make_jobs(["a1", "b1"])
        queue.submit([first, second], retry_after_s=1)
        await backend.wait_for("a1")
        backend.free("a1")
        await backend.wait_for("a1", "b1")

        assert not first.future.done()
        backend.finish("a1")
        assert (await first.future).prompt_tokens == 12


async def test_a_failing_job_fails_alone(make_jobs) -> None:
    """Its error reaches its caller and the next job runs."""
    async with dispatching() as (queue, backend, _):
        first, second = make_jobs(["a1", "b1"])
        queue.submit([first, second], retry_after_s=1)
        await backend.wait_for("a1")
        backend.finish("a1", WorkerLost("gone"))
        await backend.wait_for("a1", "b1")
        backend.finish("b1")

        assert isinstance(first.future.exception(), WorkerLost)
        await second.future


async def test_a_foreign_error_is_not_shown_to_the_caller(make_jobs) -> None:
    """What nobody foresaw becomes one plain sentence."""
    async with dispatching() as (queue, backend, _):
        (job,) = make_jobs(["a1"])
        queue.submit([job], retry_after_s=1)
        await backend.wait_for("a1")
        backend.finish("a1", RuntimeError("secret at 0xdeadbeef"))
        with pytest.raises(GenerationFailed) as failed:
            await job.future

    assert "secret" not in failed.value.message


async def test_a_caller_who_leaves_stops_the_running_job(make_jobs) -> None:
    """The backend is told, and the next job starts."""
    async with dispatching() as (queue, backend, _):
        first, second = make_jobs(["a1", "b1"])
        queue.submit([first, second], retry_after_s=1)
        await backend.wait_for("a1")
        queue.cancel(first)
        await backend.wait_for("a1", "b1")

        assert backend.stopped == ["a1"]
        assert isinstance(first.future.exception(), Cancelled)
        backend.finish("b1")
        await second.future


async def test_jobs_wait_while_the_worker_is_replaced(make_jobs) -> None:
    """Nothing is taken from the queue until a job could start."""
    queue, backend = JobQueue(4), ScriptedBackend()
    backend.is_ready.clear()
    task = asyncio.create_task(Dispatcher(queue, backend, Estimator()).run())
    (job,) = make_jobs(["a1"])
    queue.submit([job], retry_after_s=1)
    await asyncio.sleep(0)
    assert repr(queue) == "<JobQueue 1 of 4 waiting, 0 running>"

    backend.is_ready.set()
    await backend.wait_for("a1")
    backend.finish("a1")
    await job.future
    task.cancel()
    await asyncio.wait([task])


async def test_it_learns_how_long_a_job_takes(make_jobs) -> None:
    """After one picture of a tenth of a second, the next is predicted at that."""
    async with dispatching() as (queue, backend, estimator):
        (job,) = make_jobs(["a1"])
        queue.submit([job], retry_after_s=1)
        await backend.wait_for("a1")
        backend.finish("a1")
        await job.future

    assert estimator.predict(SPEC) == pytest.approx(0.1)
