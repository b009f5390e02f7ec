"""Leaves a card to other programs that need it, and takes it back: the rule, and who applies it.

NVML tells how much of a card's memory is in use. What is not the worker's own is others': its own
is what it took when it was loaded, and what PyTorch has reserved since. Whose it is decides
nothing; where NVML tells, the log names them, and no answer does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import psutil

from app.domain import GpuSnapshot
from app.telemetry.gpu import Holder
from app.worker.card_claim import CardClaim
from app.worker.pool import Pool, Worker
from app.worker.rest import Cause, RestState
from app.worker.warm_record import WarmRecord

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
_NAMED = 3
"""Programs that a log line names, those that hold the most."""

GROWTH_BYTES = 2**30
"""By so much others' use has grown since the least that was seen."""
SHORT_BYTES = 2**29
"""Less free memory than this is short; beyond what the worker needs, so much must be free again."""
_LOOKS = 2
"""Readings in a row that find the card short: one a second."""
_FREE_S = 60.0
_CYCLE_S = 300.0
"""Between two times that the card is left."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A card's memory, in bytes."""

    used: int
    total: int
    reserved: int = 0
    """By PyTorch in the worker, after the last picture; 0 where that is not known yet."""

    @property
    def free(self) -> int:
        """What nobody uses."""
        return self.total - self.used


@dataclass(slots=True)
class CardWatch:
    """Judges one card by its readings, one a second."""

    before: Reading
    """Before the worker was started."""
    needed: int = 0
    """The most that the worker was seen to take, in bytes; 0 before the first reading."""
    _least: int | None = None
    _short: int = 0
    _free_since: float | None = None
    _left_at: float | None = None

    def awake(self, reading: Reading, now: float, *, is_idle: bool) -> Cause | None:
        """Judge a card whose worker is ready; return `Cause.YIELD` where it should sleep."""
        self._free_since = None
        others = reading.used - reading.reserved
        self._least = others if self._least is None else min(self._least, others)
        growth = others - self._least
        self.needed = max(self.needed, reading.used - growth - self.before.used)
        is_short = growth >= GROWTH_BYTES and reading.free < SHORT_BYTES
        self._short = self._short + 1 if is_short and is_idle else 0
        if self._short < _LOOKS or self._is_too_soon(now):
            return None
        self._short, self._left_at = 0, now
        return Cause.YIELD

    def asleep(self, reading: Reading, now: float) -> Cause | None:
        """Judge a card that was left; return `Cause.CARD_FREE` once it can be taken back."""
        self._least = None
        if reading.free < self.needed + SHORT_BYTES:
            self._free_since = None
        elif self._free_since is None:
            self._free_since = now
        elif now - self._free_since >= _FREE_S:
            self._free_since = None
            return Cause.CARD_FREE
        return None

    def is_taken(self, needed: int) -> bool:
        """Return whether the card has no room for a worker that is known to need *needed* bytes."""
        self.needed = max(self.needed, needed)
        return self.before.free < needed + SHORT_BYTES

    def _is_too_soon(self, now: float) -> bool:
        return self._left_at is not None and now - self._left_at < _CYCLE_S


class Yielding:
    """Watches the card of one worker; `run` is a task.

    *read* and *holders* ask NVML, in a thread; *reserved* gives what PyTorch holds, *is_busy*
    whether a job runs or waits. Where NVML gives no reading, nothing is done.
    """

    def __init__(
        self,
        pool: Pool,
        worker: Worker,
        read: Callable[[], GpuSnapshot | None],
        *,
        holders: Callable[[], Sequence[Holder]],
        reserved: Callable[[], int],
        is_busy: Callable[[], bool],
        record: WarmRecord,
        claim: CardClaim,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._read = read
        self._holders = holders
        self._reserved = reserved
        self._is_busy = is_busy
        self._record = record
        self._claim = claim
        self._clock = clock
        self._watch: CardWatch | None = None

    def begin(self) -> None:
        """Take the first reading, before the worker starts; where the card is taken, it sleeps."""
        reading = self._reading(self._read())
        if reading is None:
            return
        self._watch = CardWatch(reading)
        needed = self._record.needed_bytes
        if needed and self._watch.is_taken(needed):
            _log.warning(
                "%s (%s) is left to what uses it now%s: %.1f GB are free, and %.1f GB are needed. "
                "The worker starts once they are free for a minute, or when it is told to wake.",
                self._worker.device.name,
                self._worker.device.uuid,
                self._who(),
                reading.free / 1e9,
                needed / 1e9,
            )
            self._pool.hold(self._worker)

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.look(await asyncio.to_thread(self._read)):
                # Once the worker was told: the other program's memory comes first.
                _log.warning(
                    "%s (%s) is left to another program, which needs its memory%s.",
                    self._worker.device.name,
                    self._worker.device.uuid,
                    await asyncio.to_thread(self._who),
                )

    def look(self, snapshot: GpuSnapshot | None) -> bool:
        """Judge one reading, and have the worker sleep or wake; return whether it left the card."""
        reading, rest, watch = self._reading(snapshot), self._worker.rest, self._watch
        if reading is None or watch is None:
            return False
        now = self._clock()
        cause = None
        if rest.state is RestState.AWAKE and self._worker.supervisor.is_ready:
            cause = watch.awake(reading, now, is_idle=not self._is_busy())
            self._record.keep(watch.needed)
        elif rest.state is RestState.ASLEEP and rest.is_held:
            cause = watch.asleep(reading, now)
        if cause is Cause.YIELD and self._claim.is_alone():
            self._pool.sleep(cause, self._worker)
            return True
        if cause is Cause.CARD_FREE:
            self._pool.wake(cause, self._worker)
        return False

    def close(self) -> None:
        """Release the claim."""
        self._claim.close()

    def _who(self) -> str:
        """Name who else is on the card, for the log; empty where NVML does not tell."""
        try:
            own = own_processes()
        except psutil.Error:
            return ""
        return describe([each for each in self._holders() if each.pid not in own])

    def _reading(self, snapshot: GpuSnapshot | None) -> Reading | None:
        if snapshot is None:
            return None
        return Reading(snapshot.used_bytes, snapshot.total_bytes, self._reserved())


def own_processes() -> Collection[int]:
    """Return the ids of this process and of all that it has started, workers and their server."""
    this = psutil.Process()
    return {this.pid, *(each.pid for each in this.children(recursive=True))}


def describe(holders: Sequence[Holder]) -> str:
    """Write the first of *holders* as the rest of a sentence; empty without any."""
    names = [
        f"{each.name} (process {each.pid}"
        + (f", {each.used_bytes / 1e9:.1f} GB)" if each.used_bytes else ")")
        for each in holders[:_NAMED]
    ]
    more = len(holders) - len(names)
    return f"; it is used by {', '.join(names)}" * bool(names) + f" and {more} more" * bool(more)
