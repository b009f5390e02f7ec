"""One picture on its way: what is asked, by whom, until when, and where it stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum

from app.domain import Generated, ImageSpec, Progress
from app.errors import KleinError


class JobState(Enum):
    """The legal moves: WAITING -> RUNNING -> ENDED, and WAITING -> ENDED."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


def _ignore(progress: Progress) -> None:
    """Nobody listens."""


@dataclass(eq=False, slots=True)
class Job:
    """One picture. Only the queue moves its state; whoever submitted it awaits *future*.

    Times are seconds of the queue's clock. *on_progress* is called from the event loop while the
    job runs.
    """

    id: str
    spec: ImageSpec
    client: str
    deadline: float
    future: asyncio.Future[Generated]
    on_progress: Callable[[Progress], None] = _ignore
    state: JobState = JobState.WAITING
    submitted_at: float = 0.0
    started_at: float | None = None
    predicted_s: float = 0.0
    stop: Callable[[], object] | None = field(default=None, repr=False)
    """Set while the job runs: asks the worker to stop."""
    context: Context = field(default_factory=copy_context, repr=False)
    """The request's own, in which the job runs too: the log names the request from end to end."""

    @property
    def queued_s(self) -> float | None:
        """Seconds between submission and start, once it has started."""
        return None if self.started_at is None else self.started_at - self.submitted_at

    def succeed(self, result: Generated) -> None:
        """Give *result* to whoever waits, unless the job has ended otherwise."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: KleinError) -> None:
        """Give *error* to whoever waits, unless the job has ended otherwise."""
        if not self.future.done():
            # Without the frames it came through: they hold the job, and so the job itself.
            self.future.set_exception(error.with_traceback(None))
            # A caller who has gone never asks; without this asyncio would log the error as lost.
            self.future.exception()
