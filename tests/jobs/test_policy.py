"""Which job is next."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Lora
from app.jobs.job import Job
from app.jobs.policy import MOST_OVERTAKEN, FairOrder
from tests.jobs.conftest import SPEC


def order_of(jobs: Sequence[Job], served: Sequence[str] = ()) -> FairOrder:
    """All of *jobs* wait, after one turn of each client of *served*."""
    order, loop = FairOrder(remembered=100), asyncio.get_event_loop()
    for client in served:
        order.add(Job("", SPEC, client, 60.0, loop.create_future()))
        order.take()
    for job in jobs:
        order.add(job)
    return order


async def test_one_client_is_served_in_order_of_arrival(make_jobs) -> None:
    """Without anyone else, first come is first served."""
    waiting = make_jobs(["a1", "a2", "a3"])

    assert order_of(waiting).take().id == "a1"
    assert order_of(waiting[1:], served="a").take().id == "a2"


async def test_a_client_with_eight_images_does_not_hold_up_another(make_jobs) -> None:
    """The other client's single picture comes right after the first of the eight."""
    waiting = make_jobs(["a2", "a3", "a4", "a5", "a6", "a7", "a8", "b1"])

    assert order_of(waiting, served="a").take().id == "b1"


async def test_clients_take_turns(make_jobs) -> None:
    """Three clients with two pictures each are served round and round."""
    order = order_of(make_jobs(["a1", "a2", "b1", "b2", "c1", "c2"]))

    assert [order.take().id for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "c2"]


async def test_position_counts_who_starts_before(make_jobs) -> None:
    """A position follows the same policy as the serving."""
    waiting = make_jobs(["a1", "a2", "a3", "b1"])
    by_id = {job.id: job for job in waiting}
    order = order_of(waiting, served="a")

    assert [order.position(by_id[name]) for name in ("b1", "a1", "a2", "a3")] == [0, 1, 2, 3]


class Plain:
    """The same policy, said in the fewest words and without regard to what it costs."""

    def __init__(self, remembered: int) -> None:
        self.remembered = remembered
        self.waiting: list[Job] = []
        self.last_served: dict[str, int] = {}
        self.turn = 0

    @staticmethod
    def choose(waiting: Sequence[Job], last_served: Mapping[str, int]) -> Job:
        """The first job of the client served longest ago."""
        return min(
            enumerate(waiting),
            key=lambda entry: (last_served.get(entry[1].client, -1), entry[0]),
        )[1]

    def position(self, job: Job) -> int:
        """Serve all in thought, until it is *job*'s turn."""
        left, served = list(self.waiting), dict(self.last_served)
        turn = max(served.values(), default=-1)
        for place in range(len(left)):
            chosen = self.choose(left, served)
            if chosen is job:
                return place
            left.remove(chosen)
            turn += 1
            served[chosen.client] = turn
        raise AssertionError(job)

    def take(self) -> Job:
        """Serve one, and forget clients in time."""
        job = self.choose(self.waiting, self.last_served)
        self.waiting.remove(job)
        self.turn += 1
        self.last_served[job.client] = self.turn
        if len(self.last_served) > self.remembered:
            clients = {job.client for job in self.waiting}
            self.last_served = {
                name: turn for name, turn in self.last_served.items() if name in clients
            }
        return job


steps = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abcdef")),
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 100)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=60), st.integers(1, 8))
def test_the_order_is_the_plain_one_whatever_happens(steps, remembered) -> None:
    """With jobs that come, are served and leave, of six clients of whom few are
    remembered: the same job is next each time, and each position is the same."""
    loop = asyncio.new_event_loop()
    order, plain = FairOrder(remembered), Plain(remembered)
    for number, (what, which) in enumerate(steps):
        if what == "add":
            job = Job(f"{which}{number}", SPEC, which, 60.0, loop.create_future(), predicted_s=0.1)
            order.add(job)
            plain.waiting.append(job)
        elif not plain.waiting:
            continue
        elif what == "remove":
            job = plain.waiting.pop(which % len(plain.waiting))
            order.remove(job)
        else:
            job = plain.take()
            assert order.take() is job
        assert len(order) == len(plain.waiting) == len(set(order))
        assert abs(order.work_s - sum(job.predicted_s for job in plain.waiting)) < 1e-9
        assert [order.position(job) for job in plain.waiting] == [
            plain.position(job) for job in plain.waiting
        ]
    loop.close()


def wanting(adapter: str, job: Job) -> Job:
    """Have *job* be drawn with *adapter*; an empty one is none."""
    loras = (Lora(adapter, 1.0, adapter, ""),) if adapter else ()
    job.spec = replace(job.spec, loras=loras)
    return job


def drawn_with(order: FairOrder, now: float = 0.0) -> list[Job]:
    """Take all jobs."""
    return [order.take(now) for _ in range(len(order))]


def swaps(jobs: Sequence[Job]) -> int:
    """How often the adapters change from one job to the next."""
    return sum(one.adapters != other.adapters for one, other in pairwise(jobs))


async def test_jobs_with_the_adapters_on_the_gpu_come_first(make_jobs) -> None:
    """Requests for two adapters in turn become runs; each client's own order stays within one."""
    jobs = make_jobs([f"x{number}" for number in range(16)])
    for number, job in enumerate(jobs):
        wanting("ab"[number % 2], job).submitted_at = number

    taken = drawn_with(order_of(jobs))

    assert swaps(jobs) == 15
    assert swaps(taken) <= 4
    for adapter in "ab":
        numbers = [int(job.id[1:]) for job in taken if job.spec.loras[0].name == adapter]
        assert numbers == sorted(numbers)


async def test_pictures_of_one_request_stay_together(make_jobs) -> None:
    """None of another request comes between them."""
    jobs = make_jobs([f"x{number}" for number in range(7)])
    for name, job in zip("abbbaaa", jobs, strict=True):
        wanting(name, job)

    assert swaps(drawn_with(order_of(jobs))) == 1


async def test_an_overtaken_job_still_meets_its_deadline(make_jobs) -> None:
    """One that would miss it is not overtaken."""
    for deadline, right in ((2.0, ["x0", "x1", "x2"]), (3.0, ["x0", "x2", "x1"])):
        jobs = [
            wanting(name, job)
            for name, job in zip("aba", make_jobs(["x0", "x1", "x2"]), strict=True)
        ]
        for job in jobs:
            job.predicted_s, job.deadline = 1.0, 60.0
        jobs[1].deadline = deadline

        order = order_of(jobs)
        assert [order.take(float(n)).id for n in range(3)] == right


async def test_no_other_job_parts_the_pictures_of_a_request(make_jobs) -> None:
    """One of more pictures than may overtake a job is not begun before it."""
    for pictures, right in ((4, "xxxxxy"), (5, "xyxxxx")):
        names = ["x0", "y1", *(f"x{number}" for number in range(2, 2 + pictures))]
        jobs = make_jobs(names, client="c")
        for number, (name, job) in enumerate(zip(names, jobs, strict=True)):
            wanting(name[0], job).submitted_at = float(min(number, 2))

        taken = "".join(job.id[0] for job in drawn_with(order_of(jobs)))
        assert taken[: len(right)] == right


several = st.lists(
    st.tuples(st.integers(0, 29), st.sampled_from(["", "a", "b", "c"])), min_size=20, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(several)
def test_no_job_waits_for_more_than_four_others_for_the_adapters_sake(asked) -> None:
    """Whoever asks for what: counted against the order without adapters."""

    async def takes(*, has_adapters: bool) -> list[str]:
        order, loop = FairOrder(remembered=100), asyncio.get_running_loop()
        for number, (client, adapter) in enumerate(asked):
            job = Job(str(number), SPEC, str(client), 60.0, loop.create_future())
            order.add(wanting(adapter if has_adapters else "", job))
        return [job.id for job in drawn_with(order, -1e9)]

    fair, made = (asyncio.run(takes(has_adapters=each)) for each in (False, True))
    place = {name: number for number, name in enumerate(fair)}

    assert sorted(made) == sorted(fair)
    for number, name in enumerate(made):
        assert sum(place[other] > place[name] for other in made[:number]) <= MOST_OVERTAKEN


async def test_who_comes_back_after_an_early_turn_is_served_as_without_it(make_jobs) -> None:
    """The turn counts from where it would have come, also where the client had left by then."""
    others = [f"{client}{number}" for number in (1, 2, 3) for client in "defghij"]
    places = []
    for adapter in ("b", "a"):
        order = order_of([wanting("a", job) for job in make_jobs(["w0"])])
        order.take()
        jobs = make_jobs(["x1", *others, "c1"])
        for job in jobs:
            order.add(wanting(adapter if job.id == "c1" else "b", job))
        first = [order.take(-1e9).id for _ in range(11)]
        assert first.index("c1") == (0 if adapter == "a" else 8)
        (back,) = make_jobs(["c2"])
        order.add(wanting("b", back))
        places.append((order.position(back), drawn_with(order, -1e9).index(back)))

    assert places[0] == places[1]
    assert places[0][0] == places[0][1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11), st.sampled_from("ab")), max_size=80))
def test_positions_are_right_after_early_turns(steps) -> None:
    """Each is the place in the order, where no more jobs overtake others."""

    async def check() -> None:
        order, loop = FairOrder(remembered=100), asyncio.get_running_loop()
        for is_new, client, adapter in steps:
            if is_new or not len(order):
                job = Job("", SPEC, str(client), 60.0, loop.create_future())
                order.add(wanting(adapter, job))
            else:
                order.take(-1e9)
        said = {job: order.position(job) for job in order}
        # Past their deadlines nobody is overtaken.
        assert [said[job] for job in drawn_with(order, 1e9)] == list(range(len(said)))

    asyncio.run(check())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from(["", "a", "b"])), max_size=20))
def test_clients_still_take_turns(asked) -> None:
    """With adapters too: no client is served twice more often than another that still waits."""

    async def take_all() -> None:
        order, loop = FairOrder(remembered=100), asyncio.get_running_loop()
        for client, adapter in asked:
            order.add(wanting(adapter, Job("", SPEC, client, 60.0, loop.create_future())))
        served: Counter[str] = Counter()
        while len(order):
            waiting = {job.client for job in order}
            job = order.take(-1e9)
            served[job.client] += 1
            assert served[job.client] <= min(served[each] for each in waiting) + 2

    asyncio.run(take_all())
