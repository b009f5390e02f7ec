"""What the queue does on the event loop grows no faster than what waits, counted in operations.

Counted are the interpreter's instructions in `app.jobs`, and each comparison of two jobs, which a
search through a list makes without an instruction of ours.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from app.domain import Lora
from app.errors import Cancelled, Unavailable
from app.jobs.job import Job
from app.jobs.queue import JobQueue
from app.jobs.shares import CLAIMS_MOST
from tests.jobs.conftest import SPEC

FEW, MANY = 200, 800
FIXED = 1000
"""Instructions that no number of waiting jobs explains."""


class Compared(Job):
    """A job whose comparisons are instructions, too."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def operations(work: Callable[[], object]) -> int:
    """Count what *work* takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("app.jobs") and name != __name__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


async def filled(count: int, clients: int) -> tuple[JobQueue, list[Job]]:
    """A queue in which *count* jobs of so many clients wait."""
    queue, loop = JobQueue(count + 1), asyncio.get_running_loop()
    jobs = [
        Compared(f"j{i}", SPEC, f"c{i % clients}", 1e9, loop.create_future(), predicted_s=0.5)
        for i in range(count)
    ]
    # In one piece, since places are given by shares, which is not what is counted here.
    queue.submit(jobs, retry_after_s=1)
    return queue, jobs


SHARES = {"one client": lambda count: 1, "each another": lambda count: count, "ten": lambda _: 10}


@pytest.mark.parametrize("clients", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("count", [FEW, MANY])
async def test_a_position_costs_no_more_than_a_look_at_each_job(clients, count) -> None:
    """At most sixty instructions for each of the jobs that wait, for the last of them."""
    queue, jobs = await filled(count, clients(count))

    assert operations(lambda: queue.position(jobs[-1])) <= 60 * count + FIXED
    assert queue.position(jobs[-1]) == count - 1


@pytest.mark.parametrize("clients", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("loras", [(), (Lora("a", 1.0, "a", ""),)], ids=["none", "adapters"])
async def test_the_next_job_costs_no_more_than_a_look_at_each_client(clients, count, loras) -> None:
    """At most sixty instructions for each client with a job that waits, a hundred and twenty where
    all have others than the adapters on the GPU."""
    queue, jobs = await filled(count, clients(count))
    for job in jobs:
        job.spec = replace(job.spec, loras=loras)

    def take() -> None:
        with pytest.raises(StopIteration):
            queue.take().send(None)

    assert operations(take) <= (120 if loras else 60) * clients(count) + FIXED


@pytest.mark.parametrize("clients", SHARES.values(), ids=SHARES)
async def test_asking_and_leaving_cost_the_same_however_many_wait(clients) -> None:
    """A new job, its going, the last one's going, a refusal and the expected wait."""
    queue, jobs = await filled(MANY, clients(MANY))
    future = asyncio.get_running_loop().create_future()
    job = Compared("new", SPEC, "new", 1e9, future, predicted_s=0.5)

    def refused() -> None:
        with pytest.raises(Unavailable):
            queue.submit([job] * (MANY + 2), retry_after_s=1)

    for work in (
        lambda: queue.submit([job], retry_after_s=1),
        lambda: queue.cancel(job),
        lambda: queue.cancel(jobs[-1]),
        lambda: queue.cancel(jobs[MANY // 2]),
        refused,
        queue.expected_wait_s,
    ):
        assert operations(work) <= FIXED


@pytest.mark.parametrize("clients", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("count", [FEW, MANY])
async def test_failing_all_that_waits_costs_the_same_for_each(clients, count) -> None:
    """At the service's end, at most five hundred instructions for each job."""
    queue, _ = await filled(count, clients(count))

    assert operations(lambda: queue.fail_waiting(Cancelled())) <= 500 * count


@pytest.mark.parametrize("count", [FEW, MANY])
async def test_those_turned_away_cost_no_more_however_many_they_are(count) -> None:
    """After twice as many clients were turned away as there are places, another's refusal takes at
    most four thousand instructions, and few of them are remembered."""
    queue, jobs = await filled(count, count)
    queue.submit([jobs[0]], retry_after_s=1)

    def refuse(client: str) -> None:
        with pytest.raises(Unavailable):
            queue.reserve(client, 1, retry_after_s=1)

    for number in range(2 * count):
        refuse(f"client {number}")

    assert operations(lambda: refuse("one more")) <= 4 * FIXED
    assert f", {CLAIMS_MOST} claims>" in repr(queue._shares)
