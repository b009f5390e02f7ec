"""What dies when a worker crashes, what is kept, and when the service gives up."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from app.errors import Kind, Unavailable, WorkerLost
from app.jobs.queue import JobQueue
from app.runtime import build_runtime
from app.settings import Settings
from tests.jobs.conftest import make_jobs as make_jobs
from tests.worker.conftest import SPEC
from tests.worker.conftest import supervise as supervise


@pytest.mark.slow
async def test_who_waits_for_a_worker_that_never_comes_is_answered(supervise) -> None:
    """With the third death the service gives up, and a job that was to run next is refused
    instead of waiting for ever."""
    async with supervise("exit@1") as (supervisor, listening):
        for _ in range(2):
            with pytest.raises(WorkerLost):
                await supervisor.run("a", SPEC, lambda progress: None)
        await supervisor.wait_until_ready()
        dying = asyncio.ensure_future(supervisor.run("b", SPEC, lambda progress: None))
        await listening.wait_for("killed", 3)
        next_job = asyncio.ensure_future(supervisor.run("c", SPEC, lambda progress: None))
        await listening.wait_for("fatal")
        with pytest.raises(WorkerLost):
            await dying
        with pytest.raises(Unavailable) as refused:
            await next_job

    assert refused.value.kind is Kind.WORKER_DOWN
    assert listening.fatal is not None
    assert listening.fatal[0] == 70


@pytest.mark.slow
async def test_a_worker_that_was_told_to_die_is_not_replaced(supervise) -> None:
    """Whoever insists on the end does not get a fresh worker."""
    async with supervise("slow=30") as (supervisor, listening):
        await listening.wait_for("ready")
        running = asyncio.ensure_future(supervisor.run("a", SPEC, lambda progress: None))
        await asyncio.sleep(0)
        pid = supervisor.pid
        supervisor.kill()
        with pytest.raises(WorkerLost):
            await running

        assert listening.heard == ["ready"]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.full
async def test_a_service_that_gives_up_says_so_instead_of_draining() -> None:
    """Whoever asks between giving up and the end is told that it failed; why, is the log's."""
    runtime = build_runtime(Settings(model="shapes", device="cpu"), make_engine=lambda config: None)
    await runtime.start()
    ended = await runtime.ended
    status = runtime.service.status()
    await runtime.close()

    assert ended.exit_code == 70
    assert (status.stage, status.is_ready) == ("failed", False)
    assert "the log says why" in status.reason
    assert ended.message not in status.reason


async def test_a_job_given_back_and_abandoned_leaves_the_queue_empty(make_jobs) -> None:
    """The taker is cancelled in the moment it is served, and the caller has left too: whoever
    waits for the queue to be empty is told."""
    queue = JobQueue(1)
    (job,) = make_jobs(["a1"])
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.submit([job], retry_after_s=1)
    queue.cancel(job)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    await asyncio.wait_for(queue.wait_until_empty(), 1)
    assert repr(queue) == "<JobQueue 0 of 1 waiting, 0 running>"
