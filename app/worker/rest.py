"""Whether one worker sleeps: a state machine without a clock, a process or a card.

A worker that sleeps has no process, so that its card's memory is free. Whoever wants it to sleep
waits for what it does: `settle` is asked whenever that may have ended, and says what to do now.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Cause(StrEnum):
    """Why a worker falls asleep or wakes; the values are those of the metric."""

    IDLE = "idle"
    ASKED = "asked"
    YIELD = "yield"
    """Another program needs the card."""
    REQUEST = "request"
    CARD_FREE = "card_free"
    RETRY = "retry"
    """A wake failed before."""


class RestState(StrEnum):
    """Where it is between awake and asleep; what an awake one is at, its supervisor knows."""

    AWAKE = "awake"
    LEAVING = "leaving"
    """Its process was told to end."""
    ASLEEP = "asleep"
    WAKING = "waking"


class Do(Enum):
    """What is to be done with its process."""

    NOTHING = "nothing"
    STOP = "stop"
    START = "start"


@dataclass(slots=True)
class Rest:
    """The state of one worker, and what is wanted of it."""

    state: RestState = RestState.AWAKE
    wanted: Cause | None = None
    """Why it is to fall asleep as soon as it may."""
    wakes_for: Cause | None = None
    """Why it is to be started, or has been."""
    is_held: bool = False
    """Whether the card is another program's: only who asks for it by name wakes it then."""
    failure: str = ""
    """Why the last wake failed, in words; empty once one has not."""

    @property
    def is_waking(self) -> bool:
        """Whether it will be ready again without another wish."""
        return self.state is not RestState.AWAKE and self.wakes_for is not None

    def sleep(self, cause: Cause) -> None:
        """Have it fall asleep once it may; one that sleeps goes on."""
        resting = (RestState.LEAVING, RestState.ASLEEP)
        if self.state in resting and self.wakes_for is not Cause.REQUEST:
            self.wakes_for = None
        if self.state in (RestState.AWAKE, RestState.WAKING):
            self.wanted = cause

    def wake(self, cause: Cause) -> None:
        """Have it wake, unless its card is held; one that is awake stays so where it was asked."""
        if cause is not Cause.REQUEST:
            self.wanted = None
        if self.is_held and cause is Cause.REQUEST:
            return
        if cause in (Cause.ASKED, Cause.CARD_FREE):
            self.is_held = False
        if self.state in (RestState.LEAVING, RestState.ASLEEP):
            self.wakes_for = self.wakes_for or cause

    def hold(self) -> None:
        """Begin asleep, since another program has the card."""
        self.state, self.is_held = RestState.ASLEEP, True

    def begin_again(self) -> None:
        """Have an awake one end, on which nothing has run, and wake at once."""
        self.state, self.wakes_for = RestState.LEAVING, Cause.RETRY

    def settle(self, *, is_ready: bool, has_work: bool, has_room: bool = True) -> Do:
        """Return what to do now.

        *has_work* while anything runs on it or waits for it, *has_room* while the host's memory has
        room for one more load.
        """
        if self.state is RestState.AWAKE and self.wanted and is_ready and not has_work:
            self.is_held = self.wanted is Cause.YIELD
            self.state, self.wanted = RestState.LEAVING, None
            return Do.STOP
        if self.state is RestState.ASLEEP and self.wakes_for and has_room:
            self.state = RestState.WAKING
            return Do.START
        return Do.NOTHING

    def gone(self) -> None:
        """Note that its process has ended as it was told to."""
        if self.state is RestState.LEAVING:
            self.state = RestState.ASLEEP

    def ready(self) -> Cause | None:
        """Note that it is ready; return why it woke, None where it had not slept."""
        cause, self.wakes_for = self.wakes_for, None
        woke = self.state is RestState.WAKING
        self.state, self.failure = RestState.AWAKE, ""
        return cause if woke else None

    def failed(self, why: str) -> None:
        """Note that its wake failed: it sleeps on until it is wanted again."""
        if self.state is RestState.WAKING:
            self.state, self.wakes_for, self.failure = RestState.ASLEEP, None, why
