"""One tree of errors, and what went wrong in words a caller can act on. No HTTP here.

    KleinError                 kind, message, param, code, retry_after_s
    ├── InvalidRequest         the caller's words; has param and code
    ├── Unavailable            cannot take it now: QUEUE_FULL, LOADING, DRAINING, WORKER_DOWN
    ├── Cancelled              the caller went away
    ├── DeadlineExceeded
    ├── GenerationFailed       this job failed, the worker lives
    │   └── OutOfMemory
    ├── WorkerLost             the worker died or its card is unusable; the job is not run again
    └── StartupError           the service cannot start: one sentence and what to do

`Kind` is what crosses the pipe and what `app.api.errors` maps to a status. A message is for the
caller: one plain sentence with the fix, never a traceback, path or address.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Kind(Enum):
    """What went wrong, independent of any protocol."""

    INVALID = "invalid"
    UNAUTHORIZED = "unauthorized"
    ORIGIN = "origin"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA = "unsupported_media"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    LOADING = "loading"
    DRAINING = "draining"
    WORKER_DOWN = "worker_down"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    FATAL = "fatal"
    INTERNAL = "internal"
    STARTUP = "startup"


class KleinError(Exception):
    """The root: *kind* decides the status, *message* is for the caller."""

    kind = Kind.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        kind: Kind | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidRequest(KleinError):
    """The request cannot be honoured as it stands; *param* names the field, *code* is OpenAI's
    word."""

    kind = Kind.INVALID

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_value"
    ) -> None:
        super().__init__(message, param=param, code=code)


class Unavailable(KleinError):
    """The service cannot take the job now; trying again after *retry_after_s* seconds may work."""

    def __init__(self, message: str, *, kind: Kind, retry_after_s: int) -> None:
        super().__init__(message, kind=kind, retry_after_s=retry_after_s)


class Cancelled(KleinError):
    """The caller went away, or asked for the job to stop."""

    kind = Kind.CANCELLED

    def __init__(self, message: str = "The request was cancelled.") -> None:
        super().__init__(message)


class DeadlineExceeded(KleinError):
    """The job was not done when its deadline came."""

    kind = Kind.DEADLINE


class GenerationFailed(KleinError):
    """This job failed; the next may well succeed."""

    kind = Kind.FAILED


class OutOfMemory(GenerationFailed):
    """The card had no room for this job; its memory has been given back."""

    kind = Kind.OUT_OF_MEMORY


class WorkerLost(KleinError):
    """The worker died, hung or lost its card while the job ran. The job is failed, never run
    again."""

    kind = Kind.FATAL


class StartupError(KleinError):
    """The service cannot start; the message is one sentence and what to do about it."""

    kind = Kind.STARTUP


_TYPES: Mapping[Kind, type[KleinError]] = MappingProxyType(
    {
        Kind.DEADLINE: DeadlineExceeded,
        Kind.OUT_OF_MEMORY: OutOfMemory,
        Kind.FAILED: GenerationFailed,
        Kind.FATAL: WorkerLost,
        Kind.STARTUP: StartupError,
    }
)
_UNAVAILABLE = frozenset({Kind.QUEUE_FULL, Kind.LOADING, Kind.DRAINING, Kind.WORKER_DOWN})


def from_kind(
    kind: Kind,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: int | None = None,
) -> KleinError:
    """Build the error that these, as they came over the pipe, stand for: its own class, and all
    that it said."""
    error: KleinError
    if kind is Kind.INVALID:
        error = InvalidRequest(message)
    elif kind is Kind.CANCELLED:
        error = Cancelled(message)
    elif kind in _UNAVAILABLE:
        error = Unavailable(message, kind=kind, retry_after_s=0)
    else:
        error = _TYPES.get(kind, KleinError)(message, kind=kind)
    error.param = param
    error.code = code
    error.retry_after_s = retry_after_s
    return error
