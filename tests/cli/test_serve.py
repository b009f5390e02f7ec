"""How `klein serve` ends."""

from __future__ import annotations

import signal

import pytest

from app.cli.serve import _leave_within


@pytest.fixture
def timer():
    """The process's timer, which this test may set."""
    handler = signal.getsignal(signal.SIGALRM)
    yield lambda: signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


def test_a_further_signal_does_not_put_the_end_off(timer):
    """Ctrl-C again and again does not keep the process alive; an earlier end is possible."""
    _leave_within(100, 143)
    _leave_within(200, 143)
    assert 0 < timer() <= 100
    _leave_within(50, 143)
    assert 0 < timer() <= 50
