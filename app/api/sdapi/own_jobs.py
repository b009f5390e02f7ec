"""What each client has running through this dialect, for `progress` and `interrupt`.

A client sees and stops its own jobs only: those of its key, or of its address where there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app.service.ticket import Ticket

_STARTED = 0.01
"""The least progress of a client that has jobs; 0 means none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    client: str
    ticket: Ticket
    since: float


class OwnJobs:
    """The tickets that are waited for, in order of arrival."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[_Held, None] = {}

    @contextmanager
    def hold(self, client: str, ticket: Ticket) -> Iterator[None]:
        """Count *ticket* as one of *client* meanwhile."""
        ticket.watch()
        held = _Held(client, ticket, self._clock())
        self._held[held] = None
        try:
            yield
        finally:
            del self._held[held]

    def interrupt(self, client: str) -> None:
        """Cancel all that *client* waits for."""
        for held in self._of(client):
            held.ticket.cancel()

    def progress(self, client: str) -> dict[str, Any]:
        """Describe what *client* waits for, as one piece of work."""
        of_client = self._of(client)
        advances = [held.ticket.advance() for held in of_client]
        images = sum(each.images for each in advances)
        done = sum(each.done for each in advances)
        step, steps = next(((e.step, e.steps) for e in advances if e.done < e.images), (0, 0))
        fraction = left_s = 0.0
        if of_client:
            made = sum(each.done + each.step / each.steps for each in advances)
            fraction = max(_STARTED, min(1.0, made / images))
            left_s = (self._clock() - of_client[0].since) * (1 / fraction - 1)
        return {
            "progress": fraction,
            "eta_relative": left_s,
            "state": {
                "skipped": False,
                "interrupted": False,
                "stopping_generation": False,
                "job": "",
                "job_count": images,
                "job_timestamp": "0",
                "job_no": done,
                "sampling_step": step,
                "sampling_steps": steps,
            },
            "current_image": None,
            "textinfo": None,
        }

    def _of(self, client: str) -> list[_Held]:
        return [held for held in self._held if held.client == client]
