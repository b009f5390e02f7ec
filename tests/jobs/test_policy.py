"""Which job is next."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.domain import Lora
from app.jobs.job import Job
from app.jobs.policy import MOST_OVERTAKEN, Adapters, FairOrder
from tests.jobs.conftest import SPEC


class Order(FairOrder):
    """What one device takes: the adapters of the job taken last are on it."""

    adapters: Adapters = ()

    def take(self, now: float = -math.inf, adapters: Adapters = ()) -> Job:
        job = super().take(now, self.adapters)
        self.adapters = job.adapters
        return job


def order_of(jobs: Sequence[Job], served: Sequence[str] = ()) -> Order:
    """All of *jobs* wait, after one turn of each client of *served*."""
    order, loop = Order(remembered=100), asyncio.get_event_loop()
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
    order, plain = Order(remembered), Plain(remembered)
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


def drawn_with(order: Order, now: float = 0.0) -> list[Job]:
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

    taken = drawn_with(order_of(jobs, served="ab"))

    assert swaps(jobs) == 15
    assert swaps(taken) <= 4
    for adapter in "ab":
        numbers = [int(job.id[1:]) for job in taken if job.spec.loras[0].name == adapter]
        assert numbers == sorted(numbers)


async def test_jobs_of_several_clients_become_runs_again_and_again(make_jobs) -> None:
    """Of four clients who ask for two adapters by turns, each may have the first of a run."""
    jobs = make_jobs([f"{client}{number}" for number in range(8) for client in "stuv"])
    for number, job in enumerate(jobs):
        wanting("ab"[(number + number // 4) % 2], job)

    assert swaps(drawn_with(order_of(jobs), -1e9)) <= 9


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


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ("0x 1y 2xxxx", "xxxxxy"),
        ("0x 1y 2xxxxx", "xyxxxxx"),
        ("0x 1y 2y 3y 4y 5y 6y 7y 8y 9y :xxxxx", "xyyyyyyyyyxxxxx"),
    ],
)
async def test_no_other_job_parts_the_pictures_of_a_request(make_jobs, asked, right) -> None:
    """One of more pictures than may overtake a job is not begun before it."""
    jobs = []
    for time, *names in asked.split():
        for job in make_jobs([*names], client="c"):
            jobs.append(wanting(job.id, job))
            job.submitted_at = float(ord(time))

    assert "".join(job.id for job in drawn_with(order_of(jobs))) == right


ONES_OF_ONE = [(0, "a", 1), (0, "c", 1), (0, "b", 1), (0, "b", 1)]
several = st.lists(
    st.one_of(
        st.none(),
        st.tuples(st.integers(0, 9), st.sampled_from(["", "a", "b", "c"]), st.integers(1, 4)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(several)
@example([(0, "a", 1), None, (0, "b", 1), *([(0, "a", 1), None] * 6)])
@example([(0, "b", 1), None, *ONES_OF_ONE, None, None, *((n, "d", 1) for n in range(1, 9))])
def test_no_job_waits_for_more_than_four_others_for_the_adapters_sake(steps) -> None:
    """Whoever asks for what and when: compared with the order without adapters."""

    async def takes(*, has_adapters: bool) -> list[int]:
        order, loop = Order(remembered=100), asyncio.get_running_loop()
        numbers: dict[Job, int] = {}
        taken = []
        for time, step in enumerate(steps):
            for _ in range(step[2] if step else 0):
                job = Job("", SPEC, str(step[0]), 60.0, loop.create_future(), submitted_at=time)
                order.add(wanting(step[1] if has_adapters else "", job))
                numbers[job] = len(numbers)
            if step is None and len(order):
                taken.append(order.take(-1e9))
        return [numbers[job] for job in taken + drawn_with(order, -1e9)]

    fair, made = (asyncio.run(takes(has_adapters=each)) for each in (False, True))
    place = {job: number for number, job in enumerate(fair)}

    assert sorted(made) == sorted(fair)
    for number, job in enumerate(made):
        assert number - place[job] <= MOST_OVERTAKEN
        assert sum(place[other] > place[job] for other in made[:number]) <= MOST_OVERTAKEN


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


moves = st.tuples(
    st.sampled_from(["add", "add", "take", "remove"]), st.integers(0, 11), st.sampled_from("ab")
)


@settings(max_examples=100, deadline=None)
@given(st.lists(moves, max_size=80))
def test_positions_are_right_after_early_turns(steps) -> None:
    """Each is the place in the order, where no more jobs overtake others; also as jobs leave."""

    async def check() -> None:
        order, loop = Order(remembered=100), asyncio.get_running_loop()
        waiting: set[Job] = set()
        for what, which, adapter in steps:
            if what == "add":
                job = Job("", SPEC, str(which), 60.0, loop.create_future(), predicted_s=0.1)
                order.add(wanting(adapter, job))
                waiting.add(job)
            elif what == "take" and waiting:
                waiting.remove(order.take(-1e9))
            elif waiting:
                job = list(order)[which % len(order)]
                order.remove(job)
                waiting.remove(job)
            assert len(order) == len(waiting)
            assert set(order) == waiting
            assert abs(order.work_s - 0.1 * len(waiting)) < 1e-9
            clients = Counter(job.client for job in waiting)
            assert all(order.of(str(each)) == clients[str(each)] for each in range(12))
        said = {job: order.position(job) for job in order}
        # Past their deadlines nobody is overtaken.
        assert [said[job] for job in drawn_with(order, 1e9)] == list(range(len(said)))

    asyncio.run(check())


async def test_empty_turns_stay_few_where_those_overtaken_leave(make_jobs) -> None:
    """New clients who ask and leave put the others' turns off, so those stop starting early."""
    clients = [str(number) for number in range(3 * MOST_OVERTAKEN)]
    order = order_of([], served=clients)
    for job in make_jobs(clients):
        order.add(wanting("a", job))
    order.take()
    early = 0
    for number in range(len(clients)):
        (new,) = make_jobs(["n"], client=f"new {number}")
        order.add(wanting("b", new))
        if order.take(-1e9) is not new:
            early += 1
            order.remove(new)

    assert early == MOST_OVERTAKEN


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from(["", "a", "b"])), max_size=20))
@example([("u", "")] * 6 + [("v", "a")])
def test_clients_still_take_turns(asked) -> None:
    """With adapters too: of clients that wait, none has had more than three pictures more."""

    async def take_all() -> None:
        order, loop = Order(remembered=100), asyncio.get_running_loop()
        for client, adapter in asked:
            order.add(wanting(adapter, Job("", SPEC, client, 60.0, loop.create_future())))
        served: Counter[str] = Counter()
        while len(order):
            waiting = {job.client for job in order}
            job = order.take(-1e9)
            served[job.client] += 1
            assert served[job.client] <= min(served[each] for each in waiting) + 3

    asyncio.run(take_all())
