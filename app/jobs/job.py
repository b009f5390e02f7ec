"""One image's job: its spec, client, deadline and state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from app.domain import NO_CARD, Device, Generated, ImageSpec, Progress
from app.errors import KleinError

if TYPE_CHECKING:
    from app.jobs.taker import Taker


class JobState(Enum):
    """The legal transitions: WAITING -> RUNNING -> ENDED, and WAITING -> ENDED."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


def _ignore(progress: Progress) -> None:
    """Ignore the progress."""


@dataclass(eq=False, slots=True)
class Job:
    """One image to generate; only the queue changes *state*, and the submitter awaits *future*.

    Times are seconds of the queue's clock; *started_at* counts once the job runs. *on_progress* is
    called on the event loop while the job runs.
    """

    id: str
    spec: ImageSpec
    client: str
    deadline: float
    future: asyncio.Future[Generated]
    on_progress: Callable[[Progress], None] = _ignore
    state: JobState = JobState.WAITING
    step: int = 0
    """The denoising steps made."""
    submitted_at: float = 0.0
    started_at: float = 0.0
    predicted_s: float = 0.0
    taker: Taker | None = field(default=None, repr=False)
    """Whose device it is on, once it runs."""
    number: int = 0
    """Counts the jobs as they came; the order sets it."""
    warnings: tuple[str, ...] = ()
    """What the client should know of its request."""
    cancel_running: Callable[[], object] | None = field(default=None, repr=False)
    """Set while the job runs: cancels it in the worker."""
    context: Context = field(default_factory=copy_context, repr=False)
    """The request's context, in which the job runs too, so that log lines carry the request id."""

    @property
    def device(self) -> Device:
        """The device that it is, or was, on; the NO_CARD before it runs."""
        return self.taker.device if self.taker else NO_CARD

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """The hashes and scales of the adapters that take part."""
        return tuple((each.sha256, each.scale) for each in self.spec.loras if each.scale)

    def succeed(self, result: Generated) -> None:
        """Resolve the future with *result*, unless it is done already."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: KleinError) -> None:
        """Resolve the future with *error*, unless it is done already."""
        if not self.future.done():
            # Without the traceback: its frames reference the job, a cycle.
            self.future.set_exception(error.with_traceback(None))
            # Mark it as retrieved, or asyncio logs it where the client has disconnected.
            self.future.exception()
