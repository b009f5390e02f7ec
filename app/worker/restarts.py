"""When a dead worker is replaced, and when the service gives up. Pure: deaths in, decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BACK_OFF_S = (0.0, 1.0, 2.0, 5.0)
"""Seconds to wait before the next start, by the number of deaths without a picture between."""

MAX_DEATHS = 3
WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Start again after *delay_s* seconds, or give up where it is None."""

    delay_s: float | None
    reason: str


def decide(deaths: Sequence[float], now: float) -> Decision:
    """Decide after a death; *deaths* are the times of those without a finished picture between."""
    recent = [death for death in deaths if now - death <= WINDOW_S]
    if len(recent) >= MAX_DEATHS:
        return Decision(
            None,
            f"The worker died or could not be started {len(recent)} times in ten minutes without "
            "finishing a picture",
        )
    delay = BACK_OFF_S[min(len(recent), len(BACK_OFF_S)) - 1] if recent else 0.0
    return Decision(delay, f"death {len(recent)} of {MAX_DEATHS} without a picture between")
