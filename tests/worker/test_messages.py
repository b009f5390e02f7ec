"""What went wrong in the worker is told to the caller as it was there."""

from __future__ import annotations

import pickle

import pytest

from app.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    Kind,
    KleinError,
    OutOfMemory,
    StartupError,
    Unavailable,
    WorkerLost,
)
from app.worker.messages import Failed

_OF_THEIR_OWN = {
    Kind.INVALID: InvalidRequest("w", param="size", code="too_large"),
    Kind.CANCELLED: Cancelled("w"),
    Kind.DEADLINE: DeadlineExceeded("w"),
    Kind.OUT_OF_MEMORY: OutOfMemory("w", code="c"),
    Kind.FAILED: GenerationFailed("w", param="image"),
    Kind.FATAL: WorkerLost("w"),
    Kind.STARTUP: StartupError("w"),
    Kind.QUEUE_FULL: Unavailable("w", kind=Kind.QUEUE_FULL, retry_after_s=3),
    Kind.LOADING: Unavailable("w", kind=Kind.LOADING, retry_after_s=3),
    Kind.DRAINING: Unavailable("w", kind=Kind.DRAINING, retry_after_s=3),
    Kind.WORKER_DOWN: Unavailable("w", kind=Kind.WORKER_DOWN, retry_after_s=3),
}


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_error_crosses_whole(kind) -> None:
    """The class, so that it is caught by the same names, and all that it says."""
    plain = KleinError("w", kind=kind, param="p", code="c", retry_after_s=7)
    for error in (_OF_THEIR_OWN.get(kind, plain), plain):
        arrived = pickle.loads(pickle.dumps(Failed.of("j", error))).error()

        assert type(arrived) is type(_OF_THEIR_OWN.get(kind, plain))
        assert said(arrived) == said(error)


def said(error: KleinError) -> tuple[object, ...]:
    """All that an error says."""
    words = (str(error), error.message, error.param, error.code, error.retry_after_s)
    return (error.kind, *words)
