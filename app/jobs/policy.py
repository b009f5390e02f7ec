"""The order of jobs: fair between clients, first come first served for each of them.

A client who asks for eight images at once takes eight places, but another client's single image
comes right after the first of them. The clients are served round-robin, the one served longest ago
first. No operation looks at more than one entry for each client, however many jobs wait; of the
only client that waits, `take` looks at a few.

A job whose adapters are on the GPU may start before others whose adapters would have to be brought:
within the line of the only client that waits, or as the first of another client's. Nobody is
overtaken more than a few times, and nobody past the deadline. A client served early has no other
turn where this one would have come, so that the order of the turns stays what it was.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, islice, takewhile

from app.jobs.job import Job

MOST_OVERTAKEN = 4
"""How often a job may be overtaken for the adapters' sake."""
_LOOKED_AT = 8


class FairOrder:
    """The waiting jobs, one queue per client.

    *remembered* clients without a waiting job keep their turn before they are forgotten.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._lines: dict[str, dict[Job, int]] = {}
        self._count = 0
        self._numbers = itertools.count()
        self._last_served: dict[str, int] = {}
        self._served_early: dict[str, tuple[int, int]] = {}
        """Where the turn would have come of each client that had it before."""
        self._adapters: tuple[tuple[str, float], ...] = ()
        """Of the job taken last."""
        self.work_s = 0.0
        """The predicted seconds of all waiting jobs together."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        for line in self._lines.values():
            yield from line

    def of(self, client: str) -> int:
        """Return how many jobs of *client* wait."""
        return len(self._lines.get(client, ()))

    def add(self, job: Job) -> None:
        """Append *job* to its client's queue."""
        self._lines.setdefault(job.client, {})[job] = next(self._numbers)
        self._count += 1
        self.work_s += job.predicted_s

    def remove(self, job: Job) -> None:
        """Remove *job*, which waits."""
        line = self._lines[job.client]
        del line[job]
        if not line:
            del self._lines[job.client]
        self._count -= 1
        # Sums and differences of floats leave a remainder.
        self.work_s = max(0.0, self.work_s - job.predicted_s) if self._count else 0.0

    def take(self, now: float = -math.inf) -> Job:
        """Remove and return the next job, which ends its client's turn; at least one waits.

        *now* is the time to which the jobs' deadlines belong.
        """
        client = self._next_client()
        job = next(iter(self._lines[client]))
        if job.adapters != self._adapters and (alike := self._find_alike(now)):
            job = alike
        self._adapters = job.adapters
        place = self._place(job.client)
        self.remove(job)
        if job.client == client:
            self._end_turn(client)
        else:
            self._served_early[job.client] = place
        return job

    def _next_client(self) -> str:
        """Return the client whose turn it is, and end the turns before it that came early."""
        if self._served_early:
            others = self._lines.keys() - self._served_early.keys()
            due = min(map(self._place, others), default=None)
            for client, place in sorted(self._served_early.items(), key=operator.itemgetter(1)):
                if due is None or place < due:
                    self._end_turn(client)
        return min(self._lines, key=self._place)

    def _end_turn(self, client: str) -> None:
        self._served_early.pop(client, None)
        self._last_served[client] = next(self._numbers)
        if len(self._last_served) > self._remembered:
            self._last_served = {
                name: turn for name, turn in self._last_served.items() if name in self._lines
            }
            self._served_early = {
                name: place for name, place in self._served_early.items() if name in self._lines
            }

    def _find_alike(self, now: float) -> Job | None:
        """Return a job with the adapters of the last one that may overtake those before it."""
        if len(self._lines) == 1:
            (line,) = self._lines.values()
            near = list(islice(line, _LOOKED_AT + MOST_OVERTAKEN))
            first = near[:_LOOKED_AT]
        else:
            clients = sorted(self._lines.keys() - self._served_early.keys(), key=self._place)
            near = first = [next(iter(self._lines[client])) for client in clients]
        for index, job in enumerate(first):
            if job.adapters == self._adapters:
                request = takewhile(partial(_is_of_request, job), near[index:])
                return job if _may_overtake(list(request), first[:index], now) else None
        return None

    def position(self, job: Job) -> int:
        """Return how many jobs start before *job*, which waits, if no others are added.

        Adapters may change it by a few.
        """
        return self.positions(job.client)[job]

    def positions(self, client: str) -> dict[Job, int]:
        """Map each waiting job of *client* to how many start before it, if no others are added.

        The order of the clients stays the same from round to round: the client just served is last.
        """
        if client not in self._lines:
            return {}
        mine, early = self._place(client), self._served_early
        firsts = [(self._place(each) > mine) + (each in early) for each in self._lines]
        """Before which turn of the client each one, itself too, starts its first job."""
        turns = Counter(firsts)
        turns.subtract(map(operator.add, firsts, map(len, self._lines.values())))
        started = accumulate(accumulate(turns[turn] for turn in itertools.count()))
        pairs = zip(self._lines[client], islice(started, int(client in early), None), strict=False)
        return {job: count - 1 for job, count in pairs}

    def _place(self, client: str) -> tuple[int, int]:
        """Return the sort key of a client's turn: the smallest is next."""
        return self._served_early.get(client) or (
            self._last_served.get(client, -1),
            next(iter(self._lines[client].values())),
        )


def _is_of_request(job: Job, other: Job) -> bool:
    return (other.client, other.submitted_at) == (job.client, job.submitted_at)


def _may_overtake(jobs: Sequence[Job], others: Sequence[Job], now: float) -> bool:
    """Return whether *jobs* may start before *others*, the next ones in order.

    If so, the first of them is counted.
    """
    if any(other.overtaken + len(jobs) > MOST_OVERTAKEN for other in others):
        return False
    end = now + sum(job.predicted_s for job in jobs)
    for other in others:
        end += other.predicted_s
        if end > other.deadline:
            return False
    for other in others:
        other.overtaken += 1
    return True
