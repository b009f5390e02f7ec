"""The queue against a model: whatever is reserved, submitted, cancelled, late, taken, finished or
given back, in any order, each accepted image ends exactly once and no place is ever lost."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from app.errors import Cancelled, DeadlineExceeded, GenerationFailed, Kind, Unavailable
from app.jobs.job import Job, JobState
from app.jobs.queue import JobQueue, Places
from app.jobs.taker import Taker
from tests.jobs.conftest import SPEC, generated

CAPACITY = 4
SHARE = 3
"""What one client may hold while it is not alone."""
DEADLINE_S = 60.0


class QueueModel(RuleBasedStateMachine):
    """Drives one queue in an event loop of its own, with a clock that stands."""

    accepted = Bundle("accepted")
    taken = Bundle("taken")
    reserved = Bundle("reserved")

    workers = 1

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        takers = [Taker() for _ in range(self.workers)]
        self.queue = JobQueue(CAPACITY, takers, clock=lambda: 0.0)
        self.jobs: list[Job] = []
        self.ended: Counter[str] = Counter()
        self.taking: dict[Taker, asyncio.Task[Job]] = {}
        self.is_draining = False
        self.count = 0
        self.places: list[Places] = []
        """Those that are neither filled nor given back."""
        self.asked: set[str] = set()
        self.lent = 0
        """Places beyond the bound: one for each card that was idle when a request came."""

    @property
    def idle(self) -> int:
        """How many cards wait for a job."""
        return sum(not task.done() for task in self.taking.values())

    def settle(self) -> None:
        """Let everything that is due happen."""
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def held(self, client: str) -> int:
        """How many places *client* has."""
        waiting = sum(job.client == client and job.state is JobState.WAITING for job in self.jobs)
        return waiting + sum(place.images for place in self.places if place.client == client)

    def new_jobs(self, client: str, images: int) -> list[Job]:
        """Jobs that count their ends."""
        new = []
        for _ in range(images):
            self.count += 1
            job = Job(f"{client}{self.count}", SPEC, client, DEADLINE_S, self.loop.create_future())
            job.predicted_s = 10.0
            new.append(job)
            new[-1].future.add_done_callback(lambda _, name=new[-1].id: self.ended.update([name]))
        return new

    def ask(self, client: str, images: int, *, is_early: bool = False) -> Places | None:
        """All images get a place, or none does: never beyond the bound, nor beyond a client's
        share, unless it is alone."""
        size, held = self.queue.size, self.held(client)
        idle = self.idle
        self.asked.add(client)
        try:
            places = self.queue.reserve(client, images, retry_after_s=1, is_early=is_early)
        except Unavailable as error:
            refused = error.kind
        else:
            refused = None
        if refused is not None:
            assert refused is Kind.QUEUE_FULL
            assert self.queue.size == size
            # An empty queue, and each idle card, have room for one, whoever has a claim.
            assert images > 1 or size >= (CAPACITY + idle if idle else 1) or held >= SHARE
            return None
        assert size + images <= CAPACITY + idle
        assert held + images <= SHARE or self.asked == {client}
        self.lent = max(0, size + images - CAPACITY)
        self.places.append(places)
        return places

    @rule(target=accepted, images=st.integers(1, 6), client=st.sampled_from("abc"))
    def submit(self, images: int, client: str) -> object:
        """All images get a place and wait, or none does."""
        if self.is_draining:
            return multiple()
        places = self.ask(client, images)
        return multiple() if places is None else self.fill(places)

    @rule(target=reserved, images=st.integers(1, 6), client=st.sampled_from("abc"))
    def reserve(self, images: int, client: str) -> object:
        """A request gets its places, and its pictures are decoded first."""
        places = None if self.is_draining else self.ask(client, images)
        return multiple() if places is None else places

    @rule(target=reserved, client=st.sampled_from("abc"))
    def arrive(self, client: str) -> object:
        """A request with a large body gets its first place before anything is read."""
        places = None if self.is_draining else self.ask(client, 1, is_early=True)
        return multiple() if places is None else places

    @rule(target=reserved, places=consumes(reserved), images=st.integers(1, 6))
    def widen(self, places: Places, images: int) -> object:
        """Its body was large, and now it is known how many it asks for: all get a place, or it
        has as many as before."""
        before, size, held = places.images, self.queue.size, self.held(places.client)
        more = max(0, images - before)
        idle = self.idle
        self.asked.add(places.client)
        try:
            self.queue.widen(places, before + more, retry_after_s=1)
        except Unavailable as error:
            refused = error.kind
        else:
            refused = None
        if refused is not None:
            assert refused is Kind.QUEUE_FULL
            assert more
            assert (places.images, self.queue.size) == (before, size)
        elif more:
            assert (places.images, self.queue.size) == (before + more, size + more)
            assert size + more <= CAPACITY + idle
            assert held + more <= SHARE or self.asked == {places.client}
            self.lent = max(0, size + more - CAPACITY)
        return places

    @rule(client=st.sampled_from("abc"), work_s=st.floats(0, 50), has_claim=st.booleans())
    def ask_for_time(self, client: str, work_s: float, has_claim: bool) -> None:
        """What would be late is refused, and keeps its time: never from an idle card, nor more
        than a quarter of what another has."""
        wait_s = self.queue.expected_wait_s()
        idle = self.idle
        try:
            self.queue.check_time(
                client, [work_s], DEADLINE_S, retry_after_s=1, has_claim=has_claim
            )
        except Unavailable:
            is_refused = True
        else:
            is_refused = False
        if is_refused:
            assert not idle or wait_s + work_s > DEADLINE_S
            assert wait_s + work_s + (DEADLINE_S - work_s) / 4 > DEADLINE_S
        else:
            assert wait_s + work_s <= DEADLINE_S

    @rule(target=accepted, places=consumes(reserved))
    def fill(self, places: Places) -> object:
        """Its jobs come, whatever else has come meanwhile; unless the service has ended."""
        new = self.new_jobs(places.client, places.images)

        async def enter() -> None:
            try:
                self.queue.fill(places, new)
            finally:
                self.queue.give_back(places)

        self.places.remove(places)
        if places.error is not None:
            with pytest.raises(Cancelled):
                self.loop.run_until_complete(enter())
            return multiple()
        self.jobs += new
        self.loop.run_until_complete(enter())
        return multiple(*new)

    @rule(places=consumes(reserved), times=st.integers(1, 2))
    def leave_before_the_jobs(self, places: Places, times: int) -> None:
        """Its pictures are none, or its caller leaves: once or twice, its places are free."""
        self.places.remove(places)
        for _ in range(times):
            self.queue.give_back(places)

    @rule(which=st.integers(0, 2))
    def begin_to_take(self, which: int) -> None:
        """A card is idle and asks for the next job."""
        taker = self.queue.takers[which % self.workers]
        if taker not in self.taking:
            self.taking[taker] = self.loop.create_task(self.queue.take(taker))
            self.settle()

    @rule(target=taken, which=st.integers(0, 2))
    def take(self, which: int) -> object:
        """The card gets a job, if there is one."""
        taker = self.queue.takers[which % self.workers]
        if taker not in self.taking or not self.taking[taker].done():
            return multiple()
        job = self.taking.pop(taker).result()
        assert job.state in {JobState.RUNNING, JobState.ENDED}
        return job

    @rule(which=st.integers(0, 2))
    def give_up_taking(self, which: int) -> None:
        """The card's side is cancelled; what it was about to get is not lost."""
        taker = self.queue.takers[which % self.workers]
        if taker in self.taking and not self.taking[taker].done():
            self.taking.pop(taker).cancel()
            self.settle()

    @rule(job=accepted)
    def cancel(self, job: Job) -> None:
        """The caller goes away, once or twice, before, while or after it runs."""
        self.queue.cancel(job)
        self.settle()
        assert job.future.done()

    @rule(job=accepted)
    def pass_deadline(self, job: Job) -> None:
        """Its time is over."""
        self.queue._expire(job)
        self.settle()
        assert job.future.done()

    @rule(job=consumes(taken), is_good=st.booleans())
    def finish(self, job: Job, is_good: bool) -> None:
        """The card is done with it, one way or the other."""
        if is_good:
            job.succeed(generated(SPEC))
        else:
            job.fail(GenerationFailed("scripted"))
        self.queue.finish(job)
        self.settle()

    @rule()
    def drain(self) -> None:
        """Nothing new is taken from here on."""
        self.is_draining = True

    @rule()
    def fail_waiting(self) -> None:
        """The service ends: whoever waits is told."""
        self.queue.fail_waiting(Cancelled())
        self.settle()
        assert self.queue.size == sum(places.images for places in self.places)

    @invariant()
    def no_place_is_lost(self) -> None:
        """The sizes are what the jobs say, never negative, never above the bound."""
        waiting = [job for job in self.jobs if job.state is JobState.WAITING]
        running = [job for job in self.jobs if job.state is JobState.RUNNING]
        reserved = sum(places.images for places in self.places)
        assert self.queue.size == len(waiting) + reserved <= CAPACITY + self.lent
        assert self.queue.running == len(running)
        is_expected = any(not places.is_early for places in self.places)
        assert self.queue._empty.is_set() == (not waiting and not running and not is_expected)

    @invariant()
    def each_ends_at_most_once(self) -> None:
        """And whoever has no answer yet still waits or runs."""
        self.settle()
        assert all(times == 1 for times in self.ended.values())
        for job in self.jobs:
            assert job.future.done() or job.state is not JobState.ENDED

    def teardown(self) -> None:
        """In the end everything is drained: each accepted image has ended, exactly once."""
        for places in self.places:
            self.queue.give_back(places)
        self.queue.fail_waiting(DeadlineExceeded("the end"))
        for job in self.jobs:
            if job.state is JobState.RUNNING:
                job.succeed(generated(SPEC))
                self.queue.finish(job)
        for task in self.taking.values():
            task.cancel()
        self.settle()
        assert self.ended == Counter(job.id for job in self.jobs)
        assert (self.queue.size, self.queue.running) == (0, 0)
        self.loop.run_until_complete(asyncio.wait_for(self.queue.wait_until_empty(), 1))
        self.loop.close()


class ThreeWorkers(QueueModel):
    """As `QueueModel`, with three cards."""

    workers = 3


for _model in (QueueModel, ThreeWorkers):
    _model.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


class TestQueueModel(QueueModel.TestCase):
    """Thirty lives of thirty steps each; `full` makes it a thousand."""


class TestQueueOfThreeWorkers(ThreeWorkers.TestCase):
    """The same with three cards."""


@pytest.mark.full
@pytest.mark.parametrize("model", [QueueModel, ThreeWorkers])
def test_a_thousand_lives_of_the_queue(model) -> None:
    """The long form of the model."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        model, settings=settings(max_examples=1000, stateful_step_count=40, deadline=None)
    )
