"""The bounded queue of images. Pure asyncio: no GPU, no HTTP.

A request reserves its places first, perhaps long before its jobs are known, and fills them with
jobs or gives them back. Every change of state happens without a wait in between; `take` changes
nothing until its wait is over. The bound counts images that wait or have a place; running ones
hold none. Several workers take from it. The queue's `repr` is its state.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.errors import Cancelled, DeadlineExceeded, Kind, KleinError, Unavailable
from app.jobs.job import Job, JobState
from app.jobs.policy import FairOrder
from app.jobs.shares import Shares
from app.jobs.taker import Choice, Taker

_ALIKE = 0.8
"""Of two devices of which the slower has this share of the other's speed either will do."""
_LOOK_AGAIN_S = 0.25
"""While a taker leaves the waiting jobs to others: they may be slower than predicted."""


@dataclass(eq=False, slots=True)
class Places:
    """Places reserved for *images* jobs of *client*, until they are filled or given back."""

    client: str
    is_early: bool
    """Whether the number of images is still unknown. `wait_until_empty` ignores such places."""
    images: int = 0
    error: KleinError | None = None
    """Why the places cannot be filled any more, once that is so."""


class JobQueue:
    """Holds the waiting and the running jobs. Used from the event loop's thread only."""

    def __init__(
        self,
        capacity: int,
        takers: Sequence[Taker] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without *takers* there is one, for which every job fits."""
        self.capacity = capacity
        self.takers = tuple(takers) or (Taker(),)
        self._clock = clock
        self._shares = Shares(capacity, clock=clock)
        self._waiting = FairOrder(remembered=4 * capacity)
        self._running: list[Job] = []
        self._places: set[Places] = set()
        self._reserved: Counter[str] = Counter()
        """How many of the places are each client's."""
        self._changed = asyncio.Event()
        """Set when a waiting taker may find a job."""
        self._timers: dict[Job, asyncio.TimerHandle] = {}
        self.on_change: Callable[[], object] = lambda: None
        """Called when jobs have come or ended."""
        self._empty = asyncio.Event()
        self._empty.set()

    def __repr__(self) -> str:
        reserved = f"{self._reserved.total()} reserved, " if self._reserved else ""
        return (
            f"<JobQueue {len(self._waiting)} of {self.capacity} waiting, {reserved}"
            f"{len(self._running)} running>"
        )

    @property
    def size(self) -> int:
        """The places taken, by images that wait or by requests that are being read."""
        return len(self._waiting) + self._reserved.total()

    @property
    def waiting(self) -> int:
        """The images that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The images on the GPU or being transferred from it."""
        return len(self._running)

    def check_room(self, client: str, images: int, *, retry_after_s: int) -> None:
        """Refuse *images* more of *client* if there is no room for them now.

        Raises:
            Unavailable: the queue is full, or its free places are kept for others.
        """
        self._shares.note(client)
        is_over_share = self._held(client) + images > self._shares.most
        if is_over_share and not self._is_alone(client):
            raise Unavailable.because(
                f"While others ask too, one client may hold {self._shares.most} of the queue's "
                f"{self.capacity} places; let some of yours come to their end, or ask for fewer "
                "images at a time",
                Kind.QUEUE_FULL,
                retry_after_s,
            )
        # A job that starts at once needs no place.
        idle = sum(taker.is_idle and taker.is_ready() for taker in self.takers)
        free = self.capacity + idle - self.size
        # While a device is idle, nothing is kept.
        spare = max(0, idle - len(self._waiting))
        if images <= max(free - self._shares.kept(client), min(free, spare)):
            return
        if not is_over_share:
            self._shares.claim(client, retry_after_s, images=images)
        raise Unavailable.because(
            "The queue is full"
            if images > free
            else "The queue's last places are kept for those who asked before",
            Kind.QUEUE_FULL,
            retry_after_s,
        )

    def check_time(
        self,
        client: str,
        works_s: Sequence[float],
        left_s: float,
        *,
        retry_after_s: int,
        has_claim: bool,
    ) -> None:
        """Refuse jobs of *works_s* seconds each that could not be finished in *left_s*.

        With *has_claim*, *client* gets a claim to that time once it is refused.

        Raises:
            Unavailable: too much work is queued, or the time is kept for others.
        """
        work_s = sum(works_s)
        kept_s = self._shares.kept_s(client, left_s - work_s)
        if self.expected_wait_s(kept_s) + self.span_s(works_s) <= left_s:
            return
        if has_claim:
            self._shares.claim(client, retry_after_s, work_s=work_s)
        raise Unavailable.because(
            "The queue is so long that the picture would miss its deadline",
            Kind.QUEUE_FULL,
            retry_after_s,
        )

    def span_s(self, works_s: Sequence[float]) -> float:
        """Return the most seconds in which all devices together finish jobs of *works_s* seconds.

        This is the bound of list scheduling (R. L. Graham, "Bounds on Multiprocessing Timing
        Anomalies", 1969), with the sum of the devices' speeds for their number.
        """
        speed = max(1.0, self._speed())
        return sum(works_s) / speed + (1 - 1 / speed) * max(works_s, default=0.0)

    def _speed(self) -> float:
        """Return the speed of all devices together, of which the fastest has 1.

        Where none is ready, those that come back count.
        """
        speeds = [taker.speed() for taker in self.takers if taker.is_ready()]
        return sum(speeds) or sum(taker.speed() for taker in self.takers)

    def reserve(
        self, client: str, images: int, *, retry_after_s: int, is_early: bool = False
    ) -> Places:
        """Reserve places for all *images* of *client*, or none.

        Raises:
            Unavailable: there is no room for all of them.
        """
        self.check_room(client, images, retry_after_s=retry_after_s)
        places = Places(client, is_early)
        self._places.add(places)
        self._widen(places, images)
        return places

    def widen(self, places: Places, images: int, *, retry_after_s: int) -> None:
        """Extend *places* to *images* in all, or not at all; they are no longer early.

        Raises:
            Unavailable: there is no room for all of them.
        """
        more = images - places.images
        if more > 0:
            self.check_room(places.client, more, retry_after_s=retry_after_s)
        places.is_early = False
        self._widen(places, more)

    def _widen(self, places: Places, more: int) -> None:
        places.images += more
        self._reserved[places.client] += more
        self._shares.hold_claim(places.client)
        self._settle()

    def give_back(self, places: Places) -> None:
        """Free *places*, unless they are filled or free already."""
        if places in self._places:
            self._free(places)
            self._settle()

    def _free(self, places: Places) -> None:
        self._places.remove(places)
        # This subtraction forgets a client with no place left.
        self._reserved -= Counter({places.client: places.images})

    def _held(self, client: str) -> int:
        return self._waiting.of(client) + self._reserved[client]

    def _is_alone(self, client: str) -> bool:
        """Return whether no other client holds a place, is on the GPU, or has asked lately."""
        return (
            self.size == self._held(client)
            and all(job.client == client for job in self._running)
            and self._shares.is_alone(client)
        )

    def expected_wait_s(self, more_s: float = 0.0) -> float:
        """Return the predicted seconds until a new image could start, after all that wait.

        *more_s* are seconds of work, on the fastest device, that wait besides. The work is spread
        as water fills vessels: first the device that is free first, then that and the next.
        """
        now = self._clock()
        ready = [taker for taker in self.takers if taker.is_ready()] or self.takers
        levels = sorted((taker.left_s(now), taker.speed()) for taker in ready)
        work_s, speed, filled_s = max(0.0, self._waiting.work_s + more_s), 0.0, levels[0][0]
        for left_s, its_speed in levels:
            room_s = speed * (left_s - filled_s)
            if work_s < room_s:
                break
            work_s -= room_s
            filled_s = left_s
            speed += its_speed
        return filled_s + work_s / speed

    def starts_in_s(self) -> float:
        """Return the predicted seconds until the first device is awake; 0 while one is."""
        return min(taker.starts_in_s() for taker in self.takers)

    def position(self, job: Job) -> int:
        """Return how many jobs start before *job*; 0 for the next one and for one that runs."""
        return self._waiting.position(job) if job.state is JobState.WAITING else 0

    def positions(self, client: str) -> dict[Job, int]:
        """Map each waiting job of *client* to how many jobs start before it."""
        return self._waiting.positions(client)

    def submit(self, jobs: Sequence[Job], *, retry_after_s: int) -> None:
        """Queue all of *jobs*, which are one client's, or none.

        Raises:
            Unavailable: there is no room for all of them.
        """
        self.fill(self.reserve(jobs[0].client, len(jobs), retry_after_s=retry_after_s), jobs)

    def fill(self, places: Places, jobs: Sequence[Job]) -> None:
        """Queue *jobs*, one for each of *places*.

        Raises:
            KleinError: the service has ended meanwhile.
        """
        if places.error is not None:
            raise places.error
        self._free(places)
        self._shares.end_claim(places.client)
        now = self._clock()
        for job in jobs:
            job.submitted_at = now
            self._waiting.add(job)
            self._timers[job] = asyncio.get_running_loop().call_later(
                job.deadline - now, self._expire, job
            )
        self._changed.set()
        self._settle()

    def cancel(self, job: Job) -> None:
        """Cancel *job*: a waiting one never runs, a running one is asked to stop.

        The claim of a client that has no other request is dropped.
        """
        if job.future.done():
            return
        self._cancel(job, Cancelled())
        client = job.client
        if not self._held(client) and not any(
            other.client == client and not other.future.done() for other in self._running
        ):
            self._shares.end_claim(client)

    async def take(self, taker: Taker | None = None) -> Job:
        """Wait for the next job that is for *taker* and mark it as running.

        Only one task may take for each of the takers.
        """
        taker = taker or self.takers[0]
        taker.is_idle = True
        try:
            while (job := self._choose(taker)) is None:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S if self._waiting else None):
                        await self._changed.wait()
        finally:
            taker.is_idle = False
        taker.adapters = job.adapters
        taker.running[job] = None
        self._running.append(job)
        job.taker = taker
        job.state = JobState.RUNNING
        job.started_at = self._clock()
        job.predicted_s = taker.seconds(job)
        if self._waiting:
            # What this one left to others may now be for the next that waits.
            self._changed.set()
        return job

    def _choose(self, taker: Taker) -> Job | None:
        """Take the next job that is for *taker* off the waiting ones; None where none is."""
        if not self._waiting or not taker.is_ready():
            return None
        now = self._clock()
        if self._are_alike():
            return self._waiting.take(now, taker.adapters)
        others = [each for each in self.takers if each is not taker and each.is_ready()]
        return self._waiting.take_first(Choice(taker, others, now), taker.served)

    def _are_alike(self) -> bool:
        """Return whether it matters little on which device a job runs."""
        speeds = [taker.speed() for taker in self.takers]
        is_same_room = len({taker.room() for taker in self.takers}) == 1
        return is_same_room and min(speeds) > _ALIKE * max(speeds)

    def look_again(self, error: KleinError | None = None) -> None:
        """Have waiting takers look at the jobs again: a worker has become ready, or is gone.

        Jobs that no device can run, as is known now, fail with *error*, if one is given.
        """
        if error is not None:
            for job in tuple(self._waiting):
                if not any(each.fits(job.spec) for each in self.takers):
                    self._cancel(job, error)
        self._changed.set()

    def drop(self, taker: Taker, error: KleinError) -> None:
        """Count *taker* no more, whose worker is given up while others go on.

        Jobs that only its device could run fail with *error*.
        """
        self.takers = tuple(each for each in self.takers if each is not taker)
        self.look_again(error)

    def finish(self, job: Job) -> None:
        """Record that *job*, which ran, is off the GPU, whatever its outcome."""
        self._running.remove(job)
        if job.taker is not None:
            del job.taker.running[job]
        self._end(job)
        self._changed.set()
        self._settle()

    async def wait_until_empty(self) -> None:
        """Return once nothing waits or runs, and no places but early ones are reserved."""
        await self._empty.wait()

    def fail_waiting(self, error: KleinError) -> None:
        """Fail every waiting job, and every request that has reserved places, with *error*."""
        for places in self._places:
            places.error = error
        for job in tuple(self._waiting):
            self._cancel(job, error)

    def _expire(self, job: Job) -> None:
        self._cancel(
            job,
            DeadlineExceeded(
                "The picture was not ready when the request's deadline came; "
                "ask for fewer steps or a smaller size, or try when the service is less busy."
            ),
        )

    def _cancel(self, job: Job, error: KleinError) -> None:
        """Fail *job* now; a running one leaves the GPU when the worker sees that it is to stop."""
        if job.future.done():
            return
        job.fail(error)
        if job.state is JobState.WAITING:
            self._waiting.remove(job)
            self._end(job)
        elif job.cancel_running is not None:
            job.cancel_running()
        self._settle()

    def _end(self, job: Job) -> None:
        job.state = JobState.ENDED
        self._timers.pop(job).cancel()

    def _settle(self) -> None:
        """Wake those that wait until the queue is empty, if it is."""
        if self._waiting or self._running or any(not each.is_early for each in self._places):
            self._empty.clear()
        else:
            self._empty.set()
        self.on_change()
