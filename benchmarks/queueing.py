"""How many cards a load needs: a seeded model of the queue, fed with measured seconds.

    python -m benchmarks.queueing --seconds 0.188 --wait 1

prints, for 1 to 64 cards, how many pictures in a minute can be asked for so that 19 of 20 wait no
longer than `--wait` seconds for a card, and what share of the cards' capacity that is. Two layouts:
one service with all cards, which is one queue; and one service for each card behind a proxy that
gives each request to whoever has the fewest. Two kinds of arrivals: Poisson, each picture by itself
at a random moment; and bursts, four pictures at a time. `--seconds` may list several pictures'
seconds, which are drawn with equal chance.

The same seed gives the same table. tests/benchmarks/test_queueing.py compares the model with
formulas, and with services that run.
"""

from __future__ import annotations

import argparse
import heapq
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CARDS = (1, 2, 4, 8, 16, 32, 64)
BURST = 4
ARRIVALS = 10_000
_SEED = 24
_STEPS = 7
"""Halvings of the range of loads: to 0.7 % of capacity."""
MOST = 0.95
"""The largest load that is tried. Nearer to the capacity a queue grows for as long as one looks,
and a load that is a little more than was thought makes it endless."""

REFUSED = float("inf")
"""The wait of a picture that got no place."""


@dataclass(frozen=True)
class Bounds:
    """When a service refuses, as its settings of the same names say."""

    queue_images: int = 32
    deadline_s: float = 120.0


def arrival_times(rate_per_s: float, count: int, burst: int, seed: int = _SEED) -> list[float]:
    """Return *count* moments in seconds: *burst* pictures at a time, the times being Poisson."""
    chance = random.Random(seed)
    now = 0.0
    times: list[float] = []
    while len(times) < count:
        now += chance.expovariate(rate_per_s / burst)
        times += [now] * burst
    return times[:count]


def draw_seconds(measured: Sequence[float], count: int, seed: int = _SEED) -> list[float]:
    """Return the seconds of *count* pictures, drawn from the measured ones."""
    return random.Random(seed + 1).choices(measured, k=count)


def one_queue(
    times: Sequence[float], seconds: Sequence[float], cards: int, bounds: Bounds
) -> list[float]:
    """Return how long each picture waits in one service with so many cards.

    The first that came is the first that starts, as it is among the pictures of one client. A
    service with several cards has one bound for all.
    """
    free_at = [0.0] * cards
    starts: deque[float] = deque()
    """When those begin that were put off; the earliest first."""
    waits = []
    for now, its in zip(times, seconds, strict=True):
        while starts and starts[0] <= now:
            starts.popleft()
        start = max(now, free_at[0])
        if (start > now and len(starts) >= bounds.queue_images) or (
            start + its - now > bounds.deadline_s
        ):
            waits.append(REFUSED)
            continue
        heapq.heapreplace(free_at, start + its)
        if start > now:
            starts.append(start)
        waits.append(start - now)
    return waits


def replicas(
    times: Sequence[float], seconds: Sequence[float], cards: int, bounds: Bounds
) -> list[float]:
    """Return how long each picture waits where each card is a service of its own.

    The proxy gives a request to a service with the fewest, of several to the one that it has given
    none for the longest time; where that one refuses for want of a place, all do.
    """
    free_at, held, given = [0.0] * cards, [0] * cards, [0] * cards
    ends: list[tuple[float, int]] = []
    waits = []
    for number, (now, its) in enumerate(zip(times, seconds, strict=True), 1):
        while ends and ends[0][0] <= now:
            held[heapq.heappop(ends)[1]] -= 1
        chosen = min(zip(held, given, range(cards), strict=True))[2]
        start = max(now, free_at[chosen])
        given[chosen] = number
        if held[chosen] > bounds.queue_images or start + its - now > bounds.deadline_s:
            waits.append(REFUSED)
            continue
        free_at[chosen] = start + its
        held[chosen] += 1
        heapq.heappush(ends, (start + its, chosen))
        waits.append(start - now)
    return waits


Layout = Callable[[Sequence[float], Sequence[float], int, Bounds], list[float]]
LAYOUTS: dict[str, Layout] = {"one service": one_queue, "a service for each card": replicas}
KINDS = {"Poisson": 1, "bursts": BURST}


def share_within(waits: Sequence[float], limit_s: float) -> float:
    """Return the share of pictures that wait no longer than *limit_s*; a refused one does."""
    return bisect_right(sorted(waits), limit_s) / len(waits)


def largest_load(
    layout: Layout, cards: int, burst: int, measured: Sequence[float], wait_s: float, bounds: Bounds
) -> float:
    """Return the largest share of the cards' capacity with which 19 of 20 wait at most *wait_s*."""
    unit = arrival_times(1.0, ARRIVALS, burst)
    seconds = draw_seconds(measured, ARRIVALS)
    capacity_per_s = cards * ARRIVALS / sum(seconds)
    low, high = 0.0, MOST

    def is_served(load: float) -> bool:
        times = [moment / (load * capacity_per_s) for moment in unit]
        return share_within(layout(times, seconds, cards, bounds), wait_s) >= 0.95

    if is_served(high):
        return high
    for _ in range(_STEPS):
        load = (low + high) / 2
        low, high = (load, high) if is_served(load) else (low, load)
    return low


def table(measured: Sequence[float], wait_s: float, bounds: Bounds) -> str:
    """Return the table as Markdown: pictures in a minute, and their share of the capacity."""
    columns = [(name, kind) for name in LAYOUTS for kind in KINDS]
    lines = [
        "| cards | " + " | ".join(f"{name}, {kind}" for name, kind in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    mean_s = sum(measured) / len(measured)
    for cards in CARDS:
        cells = []
        for name, kind in columns:
            load = largest_load(LAYOUTS[name], cards, KINDS[kind], measured, wait_s, bounds)
            cells.append(f"{60 * load * cards / mean_s:,.0f} ({load:.0%})")
        lines.append(f"| {cards} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(text: str) -> list[float]:
    found = [float(word) for word in text.split(",")]
    if min(found) <= 0:
        raise argparse.ArgumentTypeError("seconds are above 0")
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=_seconds, required=True, help="measured, for a picture")
    parser.add_argument("--wait", type=float, required=True, help="longest wait of 19 in 20, in s")
    parser.add_argument("--queue-images", type=int, default=Bounds.queue_images)
    parser.add_argument("--deadline-s", type=float, default=Bounds.deadline_s)
    given = parser.parse_args()
    print(table(given.seconds, given.wait, Bounds(given.queue_images, given.deadline_s)))


if __name__ == "__main__":
    main()
