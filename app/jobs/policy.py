"""Which job is next: fair between clients, first come first served for each of them.

Pure: a snapshot in, a choice out. A client who asks for eight pictures at once takes eight places,
but another client's single picture comes right after the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.jobs.job import Job


def choose(waiting: Sequence[Job], last_served: Mapping[str, int]) -> Job:
    """Pick from *waiting* (in order of arrival) the first job of the client served longest ago.

    *last_served* counts up with every job started; a client who is not in it has never been served.
    """
    return min(
        enumerate(waiting),
        key=lambda entry: (last_served.get(entry[1].client, -1), entry[0]),
    )[1]


def position(job: Job, waiting: Sequence[Job], last_served: Mapping[str, int]) -> int:
    """How many of *waiting* start before *job* if nobody else comes."""
    left, served, turn = list(waiting), dict(last_served), max(last_served.values(), default=-1)
    for place in range(len(waiting)):
        chosen = choose(left, served)
        if chosen is job:
            return place
        left.remove(chosen)
        turn += 1
        served[chosen.client] = turn
    return 0
