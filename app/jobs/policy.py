"""The order of jobs: fair between clients, first come first served for each of them.

A client who asks for eight images at once takes eight places, but another client's single image
comes right after the first of them. The clients are served round-robin, the one served longest ago
first. No operation looks at more than one entry for each client, however many jobs wait; of the
only client that waits, `take` looks at a few.

A job whose adapters are on the GPU may start before others whose adapters would have to be brought:
within the line of the only client that waits, or as the first of another client's. Nobody is
overtaken more than a few times, and nobody past the deadline.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

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
        self._served_early: set[str] = set()
        """Clients that had their next turn before it came."""
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
        while (client := min(self._lines, key=self._place)) in self._served_early:
            self._end_turn(client)
        job = next(iter(self._lines[client]))
        if job.adapters != self._adapters and (alike := self._find_alike(now)):
            job = alike
        self._adapters = job.adapters
        self.remove(job)
        if job.client == client:
            self._end_turn(client)
        else:
            # Its turn comes where it would have come, so that the order of the clients stays.
            self._served_early.add(job.client)
        return job

    def _end_turn(self, client: str) -> None:
        self._served_early.discard(client)
        self._last_served[client] = next(self._numbers)
        if len(self._last_served) > self._remembered:
            self._last_served = {
                name: turn for name, turn in self._last_served.items() if name in self._lines
            }
            self._served_early &= set(self._lines)

    def _find_alike(self, now: float) -> Job | None:
        """Return a job with the adapters of the last one that may overtake those before it."""
        if len(self._lines) == 1:
            (line,) = self._lines.values()
            first = list(itertools.islice(line, _LOOKED_AT))
        else:
            clients = sorted(set(self._lines) - self._served_early, key=self._place)
            first = [next(iter(self._lines[client])) for client in clients]
        for index, job in enumerate(first):
            if job.adapters == self._adapters:
                return job if _may_overtake(job, first[:index], now) else None
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
        found: dict[Job, int] = {}
        if client not in self._lines:
            return found
        mine, position = self._place(client), 0
        ends: Counter[int] = Counter()
        """How many others have their last turn in each round, counted from 0."""
        for other, line in self._lines.items():
            if other != client:
                is_before = self._place(other) < mine
                position += is_before
                ends[len(line) - is_before] += 1
        others = ends.total()
        for rounds, job in enumerate(self._lines[client]):
            if rounds:
                others -= ends[rounds - 1]
                position += 1 + others
            found[job] = position
        return found

    def _place(self, client: str) -> tuple[int, int]:
        """Return the sort key of a client's turn: the smallest is next."""
        return self._last_served.get(client, -1), next(iter(self._lines[client].values()))


def _may_overtake(job: Job, others: Sequence[Job], now: float) -> bool:
    """Return whether *job* may start before *others*, the next ones in order, and count it."""
    if any(other.overtaken >= MOST_OVERTAKEN for other in others):
        return False
    end = now + job.predicted_s
    for other in others:
        end += other.predicted_s
        if end > other.deadline:
            return False
    for other in others:
        other.overtaken += 1
    return True
