"""Restart policy of the worker: back off, then give up. Pure: no clock, no process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BACK_OFF_S = (0.0, 1.0, 2.0, 5.0)
"""Seconds before the next start, by the number of deaths without a finished image between."""

MAX_DEATHS = 3
WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Restart after *delay_s* seconds; None means give up."""

    delay_s: float | None
    reason: str


def decide(deaths: Sequence[float], now: float, failed_starts: int) -> Decision:
    """Decide after a death; *deaths* are the times of those without a finished image between.

    *failed_starts* are those in a row that did not become ready. They count regardless of their
    time: one start may take longer than the window.
    """
    recent = sum(now - death <= WINDOW_S for death in deaths)
    if recent >= MAX_DEATHS:
        return Decision(
            None,
            f"The worker died or could not be started {recent} times in ten minutes without "
            "finishing a picture",
        )
    if failed_starts >= MAX_DEATHS:
        return Decision(
            None,
            f"The worker died or could not be started {failed_starts} times in a row before it was "
            "ready",
        )
    count = max(recent, failed_starts)
    delay = BACK_OFF_S[min(count, len(BACK_OFF_S)) - 1] if count else 0.0
    return Decision(delay, f"death {count} of {MAX_DEATHS} without a picture between")
