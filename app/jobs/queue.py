"""The bounded queue of images. Pure asyncio: no card, no HTTP.

Every change of state happens in `_settle` or in the synchronous methods that call it; coroutines
only wait. The bound counts images that wait; running ones hold no place. The queue's `repr` is its
state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from app.errors import Cancelled, DeadlineExceeded, Kind, KleinError, Unavailable
from app.jobs import policy
from app.jobs.job import Job, JobState


class JobQueue:
    """Holds the waiting jobs and knows the running ones. Touched from the event loop's thread
    only."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = capacity
        self._clock = clock
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._taker: asyncio.Future[Job] | None = None
        self._timers: dict[Job, asyncio.TimerHandle] = {}
        self._last_served: dict[str, int] = {}
        self._turn = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __repr__(self) -> str:
        return (
            f"<JobQueue {len(self._waiting)} of {self.capacity} waiting, "
            f"{len(self._running)} running>"
        )

    @property
    def size(self) -> int:
        """How many images wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many images are on the card or on their way from it."""
        return len(self._running)

    def has_room(self, images: int) -> bool:
        """Whether *images* more may wait; one that could start at once needs no place."""
        return self.size + images <= self.capacity + self._idle_places

    @property
    def _idle_places(self) -> int:
        return 1 if self._taker is not None and not self._taker.done() else 0

    def expected_wait_s(self) -> float:
        """Seconds until everything that is here now has run, by the predictions given with the
        jobs."""
        now = self._clock()
        left = sum(
            max(0.0, job.predicted_s - (now - (job.started_at or now))) for job in self._running
        )
        return left + sum(job.predicted_s for job in self._waiting)

    def position(self, job: Job) -> int:
        """How many jobs start before *job*; 0 for the next one and for one that runs."""
        if job.state is not JobState.WAITING:
            return 0
        return policy.position(job, self._waiting, self._last_served)

    def submit(self, jobs: Sequence[Job], *, retry_after_s: int) -> None:
        """Let all of *jobs* wait, or none.

        Raises:
            Unavailable: there is no room for all of them.
        """
        if not self.has_room(len(jobs)):
            raise Unavailable(
                f"The queue is full; try again in {retry_after_s} s.",
                kind=Kind.QUEUE_FULL,
                retry_after_s=retry_after_s,
            )
        now = self._clock()
        loop = asyncio.get_running_loop()
        for job in jobs:
            job.submitted_at = now
            self._waiting.append(job)
            self._timers[job] = loop.call_later(job.deadline - now, self._expire, job)
        self._settle()

    def cancel(self, job: Job) -> None:
        """The caller has gone: a waiting job never runs, a running one is asked to stop."""
        self._abandon(job, Cancelled())

    async def take(self) -> Job:
        """Wait for the next job and mark it as running. One taker at a time."""
        taker: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._taker = taker
        self._settle()
        try:
            return await taker
        except BaseException:
            if taker.done() and not taker.cancelled():
                self._put_back(taker.result())
            raise
        finally:
            self._taker = None

    def _put_back(self, job: Job) -> None:
        """The taker was cancelled in the moment it was served: *job* is first in line again."""
        self._running.remove(job)
        if job.future.done():
            self._end(job)
        else:
            job.state = JobState.WAITING
            job.started_at = None
            self._waiting.insert(0, job)
        self._settle()

    def finish(self, job: Job) -> None:
        """The card is done with *job*, whatever came of it."""
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self._end(job)
        self._settle()

    async def wait_until_empty(self) -> None:
        """Return once nothing waits and nothing runs."""
        await self._empty.wait()

    def fail_waiting(self, error: KleinError) -> None:
        """Give *error* to every job that waits."""
        for job in tuple(self._waiting):
            self._abandon(job, error)

    def _expire(self, job: Job) -> None:
        self._abandon(
            job,
            DeadlineExceeded(
                "The picture was not ready when the request's deadline came; "
                "ask for fewer steps or a smaller size, or try when the service is less busy."
            ),
        )

    def _abandon(self, job: Job, error: KleinError) -> None:
        """Answer the caller now; the card is freed as soon as the worker looks up."""
        if job.future.done():
            return
        job.fail(error)
        if job.state is JobState.WAITING:
            self._waiting.remove(job)
            self._end(job)
        elif job.stop is not None:
            job.stop()
        self._settle()

    def _end(self, job: Job) -> None:
        job.state = JobState.ENDED
        job.ended_at = self._clock()
        if timer := self._timers.pop(job, None):
            timer.cancel()

    def _settle(self) -> None:
        """Give the next job to the taker, if there are both."""
        if self._waiting and self._taker is not None and not self._taker.done():
            job = policy.choose(self._waiting, self._last_served)
            self._waiting.remove(job)
            self._running.append(job)
            job.state = JobState.RUNNING
            job.started_at = self._clock()
            self._turn += 1
            self._remember_turn(job.client)
            self._taker.set_result(job)
        if self._waiting or self._running:
            self._empty.clear()
        else:
            self._empty.set()

    def _remember_turn(self, client: str) -> None:
        """Note when *client* was served; those without a waiting job are forgotten in time."""
        self._last_served[client] = self._turn
        if len(self._last_served) > 4 * self.capacity:
            waiting = {job.client for job in self._waiting}
            self._last_served = {
                name: turn for name, turn in self._last_served.items() if name in waiting
            }
