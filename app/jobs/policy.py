"""The order of jobs: fair between clients, first come first served for each of them.

A client who asks for eight images at once takes eight places, but another client's single image
comes right after the first of them. The clients are served round-robin, the one served longest ago
first. Taking a job looks at one entry for each client, however many jobs wait; of the only client
that waits, at a few.

Where devices differ in size or speed, a job that should be left to another device is passed over
and keeps its place; each device serves the clients in turns of its own.

A job whose adapters are on the GPU may start before others whose adapters would have to be brought:
within the line of the only client that waits, or as the first of another client's, of each client
once. The turns go on as they would without: one for each job taken. Whose turn has come is due and
starts at most a few jobs later, never so late that it would miss its deadline; who started early
has an empty turn.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice, takewhile

from app.jobs.job import Job

Adapters = tuple[tuple[str, float], ...]
"""Hashes and scales of adapters (`Job.adapters`)."""

MOST_OVERTAKEN = 4
"""How many jobs later than in its turn a job may start for the adapters' sake."""
_LOOKED_AT = 8
_LOOKED_AT_FOR_ONE = 256
"""How many jobs may be passed over for a device; more would hold up the event loop."""


class FairOrder:
    """The waiting jobs: those that are due, and one queue per client.

    *remembered* clients without a waiting job keep their turn before they are forgotten.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._lines: dict[str, dict[int, Job | None]] = {}
        """By the jobs' numbers; None has started early."""
        self._due: dict[Job, int] = {}
        """Which job taken should have been each of them, in this order."""
        self._early = 0
        """The empty turns in the queues."""
        self._ahead: set[str] = set()
        """The clients that had a job started early since one started in turn."""
        self._taken = 0
        self._count = 0
        self._held: Counter[str] = Counter()
        """How many jobs of each client wait."""
        self._numbers = itertools.count()
        self._last_served: dict[str, int] = {}
        self.work_s = 0.0
        """The predicted seconds of all waiting jobs together."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        yield from self._due
        for line in self._lines.values():
            yield from filter(None, line.values())

    def of(self, client: str) -> int:
        """Return how many jobs of *client* wait."""
        return self._held[client]

    def add(self, job: Job) -> None:
        """Append *job* to its client's queue."""
        job.number = next(self._numbers)
        self._lines.setdefault(job.client, {})[job.number] = job
        self._count += 1
        self._held[job.client] += 1
        self.work_s += job.predicted_s

    def remove(self, job: Job) -> None:
        """Remove *job*, which waits."""
        if self._due.pop(job, None) is None:
            line = self._lines[job.client]
            del line[job.number]
            if not line:
                del self._lines[job.client]
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """Count *job*, which has left, no more."""
        self._count -= 1
        self._held[job.client] -= 1
        if not self._held[job.client]:
            del self._held[job.client]
        # Sums and differences of floats leave a remainder.
        self.work_s = max(0.0, self.work_s - job.predicted_s) if self._count else 0.0

    def take(self, now: float = -math.inf, adapters: Adapters = ()) -> Job:
        """Remove and return the next job; at least one waits.

        *now* is the time to which the jobs' deadlines belong, *adapters* are on the device that
        takes it.
        """
        self._taken += 1
        if self._lines:
            self._end_turn()
        while not self._due:
            self._end_turn()
        in_turn = next(iter(self._due))
        job = in_turn
        if job.adapters != adapters:
            job = self._find_alike(now, adapters) or job
        if job is in_turn:
            self._ahead.clear()
        else:
            self._ahead.add(job.client)
        if self._due.pop(job, None) is None:
            self._lines[job.client][job.number] = None
            self._early += 1
        self._forget(job)
        return job

    def take_first(self, is_for_taker: Callable[[Job], bool], served: dict[str, int]) -> Job | None:
        """Remove and return the first job in order that *is_for_taker*; None where none is.

        It looks at a few hundred. *served* are the turns of the taker's own: a client whose small
        jobs it takes keeps its turn for a large one on another device.
        """
        first = islice(self._in_order(served), _LOOKED_AT_FOR_ONE)
        job = next(filter(is_for_taker, first), None)
        if job is None:
            return None
        self._taken += 1
        if self._due.pop(job, None) is None:
            self._pop(job.client, job.number)
        served[job.client] = next(self._numbers)
        if len(served) > self._remembered:
            for client in set(served).difference(self._held):
                del served[client]
        self._forget(job)
        return job

    def _in_order(self, served: dict[str, int]) -> Iterator[Job]:
        """Yield the waiting jobs: those that are due, the first of each client, the second, ..."""
        yield from self._due
        clients = sorted(
            self._lines, key=lambda name: (served.get(name, -1), next(iter(self._lines[name])))
        )
        rounds = itertools.zip_longest(*(self._lines[client].values() for client in clients))
        yield from filter(None, itertools.chain.from_iterable(rounds))

    def _end_turn(self) -> None:
        """End the turn of the client served longest ago: its first job is due."""
        client = min(self._lines, key=self._place)
        job = self._pop(client, next(iter(self._lines[client])))
        if job:
            self._due[job] = self._taken
        else:
            self._early -= 1

    def _pop(self, client: str, number: int) -> Job | None:
        """Take a job, or an empty turn, out of *client*'s queue; the client has been served."""
        line = self._lines[client]
        job = line.pop(number)
        if not line:
            del self._lines[client]
        self._last_served[client] = next(self._numbers)
        if len(self._last_served) > self._remembered:
            self._last_served = {
                name: turn for name, turn in self._last_served.items() if name in self._lines
            }
        return job

    def _find_alike(self, now: float, adapters: Adapters) -> Job | None:
        """Return a job with *adapters* that may start before those in turn."""
        is_alone = len(self._held) == 1
        first = [*self._due, *(self._next_of_one() if is_alone else self._next_of_each())]
        for index, job in enumerate(first[:_LOOKED_AT] if is_alone else first):
            if job.adapters == adapters and (is_alone or job.client not in self._ahead):
                request = list(takewhile(partial(_is_of_request, job), first[index:]))
                return job if self._may_overtake(request, first[:index], now) else None
        return None

    def _next_of_one(self) -> Iterator[Job]:
        """Return a few jobs of the only client that waits."""
        (client,) = self._held
        line = self._lines.get(client, {})
        return filter(None, islice(line.values(), _LOOKED_AT + MOST_OVERTAKEN))

    def _next_of_each(self) -> Iterator[Job]:
        """Return the first job of each client, unless it started early, in the order of turns."""
        lines = (self._lines[client] for client in sorted(self._lines, key=self._place))
        return filter(None, (next(iter(line.values())) for line in lines))

    def _may_overtake(self, jobs: Sequence[Job], others: Sequence[Job], now: float) -> bool:
        """Return whether *jobs* may start before *others*, which are the next ones in order."""
        late = self._taken - self._due[others[0]]
        if max(late, self._early) + len(jobs) > MOST_OVERTAKEN:
            return False
        start = now + sum(job.predicted_s for job in jobs)
        ends = accumulate((other.predicted_s for other in others), initial=start)
        return all(
            end <= other.deadline for end, other in zip(islice(ends, 1, None), others, strict=True)
        )

    def position(self, job: Job) -> int:
        """Return how many jobs start before *job*, which waits, if no others are added.

        Adapters may change it by a few.
        """
        return self.positions(job.client)[job]

    def positions(self, client: str) -> dict[Job, int]:
        """Map each waiting job of *client* to how many start before it, if no others are added.

        The order of the clients stays the same from round to round: the client just served is last.
        """
        found = {job: count for count, job in enumerate(self._due) if job.client == client}
        if client in self._lines:
            mine = self._place(client)
            turns = Counter(
                turn
                for name, line in self._lines.items()
                for turn, job in enumerate(line.values(), self._place(name) > mine)
                if job
            )
            """How many start from one turn of the client's to the next."""
            started = accumulate(turns[turn] for turn in itertools.count())
            jobs = zip(self._lines[client].values(), started, strict=False)
            found |= {job: len(self._due) + count - 1 for job, count in jobs if job}
        return found

    def _place(self, client: str) -> tuple[int, int]:
        """Return the sort key of a client's turn: the smallest is next."""
        return self._last_served.get(client, -1), next(iter(self._lines[client]))


def _is_of_request(job: Job, other: Job) -> bool:
    return (other.client, other.submitted_at) == (job.client, job.submitted_at)
