"""The state machine of sleep: every order of events, and what is promised in each."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.worker.rest import Cause, Do, Rest, RestState

SLEEPS = st.sampled_from([Cause.IDLE, Cause.ASKED, Cause.YIELD])
WAKES = st.sampled_from([Cause.REQUEST, Cause.ASKED, Cause.CARD_FREE, Cause.RETRY])


class RestMachine(RuleBasedStateMachine):
    """A worker's process beside its `Rest`: the machine may only start what is not there."""

    @initialize(begins_held=st.booleans())
    def begin(self, begins_held: bool) -> None:
        """With a worker that loads, or with a card that is another program's."""
        self.rest = Rest()
        self.process = "none" if begins_held else "loading"
        self.has_work = False
        if begins_held:
            self.rest.hold()

    def look(self) -> None:
        """Do what is to be done, as the pool does."""
        if self.has_work and not (self.rest.is_held or self.rest.failure):
            self.rest.wake(Cause.REQUEST)
        act = self.rest.settle(is_ready=self.process == "ready", has_work=self.has_work)
        if act is Do.STOP:
            assert self.process == "ready"
            assert not self.has_work, "work was interrupted"
            self.process = "leaving"
        elif act is Do.START:
            assert self.process == "none", "two processes on one card"
            self.process = "loading"

    @rule(cause=SLEEPS)
    def sleep(self, cause: Cause) -> None:
        """Somebody wants it asleep."""
        self.rest.sleep(cause)
        self.look()

    @rule(cause=WAKES)
    def wake(self, cause: Cause) -> None:
        """Somebody wants it awake."""
        self.rest.wake(cause)
        self.look()

    @precondition(lambda self: not self.has_work)
    @rule()
    def job_comes(self) -> None:
        """A job waits."""
        self.has_work = True
        self.look()

    @precondition(lambda self: self.has_work and self.process == "ready")
    @rule()
    def job_ends(self) -> None:
        """A worker that is ready finishes what there is."""
        self.has_work = False
        self.look()

    @precondition(lambda self: self.process == "leaving")
    @rule()
    def process_ends(self) -> None:
        """As it was told to."""
        self.process = "none"
        self.rest.gone()
        self.look()

    @precondition(lambda self: self.process == "loading")
    @rule()
    def process_is_ready(self) -> None:
        """After a start or a restart."""
        self.process = "ready"
        self.rest.ready()
        self.look()

    @precondition(lambda self: self.process == "loading" and self.rest.state is RestState.WAKING)
    @rule()
    def wake_fails(self) -> None:
        """The process dies before it is ready."""
        self.process = "none"
        self.rest.failed("no room")
        self.look()

    @precondition(lambda self: self.process == "ready" and self.rest.state is RestState.AWAKE)
    @rule()
    def worker_dies(self) -> None:
        """Its supervisor starts it again by itself."""
        self.process = "loading"
        self.look()

    @invariant()
    def a_request_is_never_forgotten(self) -> None:
        """Work finds a worker that is there, or comes, unless the card is not to be had."""
        if self.has_work and not (self.rest.is_held or self.rest.failure):
            assert self.process != "none"

    @invariant()
    def it_knows_whether_there_is_a_process(self) -> None:
        """Asleep and no process are the same."""
        assert (self.rest.state is RestState.ASLEEP) == (self.process == "none")


RestMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class TestRest(RestMachine.TestCase):
    """Forty lives of thirty steps each; `full` makes it two hundred."""


@pytest.mark.full
def test_two_hundred_lives() -> None:
    """The long form of the model."""
    run_state_machine_as_test(
        RestMachine, settings=settings(max_examples=200, stateful_step_count=30, deadline=None)
    )


def test_a_held_card_is_taken_back_by_name_only() -> None:
    """No request wakes it; who asks for it, or its being free, does."""
    for cause, wakes in (
        (Cause.REQUEST, False),
        (Cause.RETRY, True),
        (Cause.ASKED, True),
        (Cause.CARD_FREE, True),
    ):
        rest = Rest()
        rest.hold()
        rest.wake(cause)
        assert (rest.settle(is_ready=False, has_work=True) is Do.START) is wakes


def test_the_cause_of_a_wake_is_the_first() -> None:
    """What came later did not wake it."""
    rest = Rest(RestState.ASLEEP)
    rest.wake(Cause.REQUEST)
    rest.wake(Cause.ASKED)
    assert rest.settle(is_ready=False, has_work=True) is Do.START
    assert rest.ready() is Cause.REQUEST
    assert rest.ready() is None
