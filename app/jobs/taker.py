"""A worker as the queue sees it: what fits on its device, and how fast that is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from app.domain import NO_CARD, Device, ImageSpec
from app.jobs.job import Job


def _always() -> bool:
    return True


def _fits(spec: ImageSpec) -> bool:
    return True


def _alike() -> Hashable:
    return None


def _fastest() -> float:
    return 1.0


def _at_once() -> float:
    return 0.0


@dataclass(eq=False, slots=True)
class Taker:
    """One of those that take jobs from the queue; each has a dispatcher.

    *predict_s* gives the seconds that a spec takes on this device; without it all devices are
    alike, and a job takes what it is predicted to take.
    """

    device: Device = NO_CARD
    is_ready: Callable[[], bool] = _always
    """Whether a job could start now; a worker that is being restarted takes none."""
    fits: Callable[[ImageSpec], bool] = _fits
    predict_s: Callable[[ImageSpec], float] | None = None
    speed: Callable[[], float] = _fastest
    """Relative to the fastest device, which has 1."""
    room: Callable[[], Hashable] = _alike
    """Equal for devices that the same jobs fit."""
    starts_in_s: Callable[[], float] = _at_once
    """Predicted seconds until a worker that sleeps, or is waking, is ready."""
    running: dict[Job, None] = field(default_factory=dict, repr=False)
    """Jobs on the device or being transferred from it."""
    is_idle: bool = False
    """Whether its dispatcher waits for a job: what still runs is being transferred."""
    adapters: tuple[tuple[str, float], ...] = ()
    """Of the job taken last: its adapters are on the device."""
    served: dict[str, int] = field(default_factory=dict, repr=False)
    """When it served each client, where devices differ (`FairOrder.take_first`)."""

    def seconds(self, job: Job) -> float:
        """Return the predicted seconds of *job* on this device."""
        return job.predicted_s if self.predict_s is None else self.predict_s(job.spec)

    def left_s(self, now: float) -> float:
        """Return the predicted seconds until it has woken and its running jobs have ended."""
        if self.is_idle:
            return self.starts_in_s()
        running_s = sum(max(0.0, job.predicted_s - (now - job.started_at)) for job in self.running)
        return running_s + self.starts_in_s()

    def free_in_s(self, now: float) -> float:
        """Return the predicted seconds until another job could start.

        A job that takes longer than predicted is expected to take as long again as it is late:
        else the others would wait for ever for a device that hangs.
        """
        if self.is_idle:
            return 0.0
        return sum(abs(job.predicted_s - (now - job.started_at)) for job in self.running)


class Choice:
    """Which jobs one taker should leave to others: list scheduling by the earliest finish.

    Jobs are shown to it in their order. Each is assigned to the device that would finish it first,
    after what was assigned to it before; the first that is assigned to *taker* is its own.
    (Earliest finish time, as in H. Topcuoglu et al., "Performance-effective and low-complexity
    task scheduling for heterogeneous computing", 2002, section 4.1.)
    """

    def __init__(self, taker: Taker, others: Iterable[Taker], now: float) -> None:
        self._taker = taker
        self._load_s = {each: each.free_in_s(now) for each in (taker, *others)}

    def __call__(self, job: Job) -> bool:
        """Return whether *job*, the next in order, is the taker's."""
        ends = {
            each: load_s + each.seconds(job)
            for each, load_s in self._load_s.items()
            if each.fits(job.spec)
        }
        if not ends:
            return False
        # Of equals the first, which is the taker.
        best = min(ends, key=ends.__getitem__)
        if best is self._taker:
            return True
        self._load_s[best] = ends[best]
        return False
