"""The tree of errors, each with a message that a client can act on. No HTTP here.

    KleinError                 kind, message, param, code, retry_after_s
    ├── InvalidRequest         the request is wrong; has param and code
    ├── Unavailable            cannot take it now: QUEUE_FULL, LOADING, DRAINING, WORKER_DOWN
    ├── Cancelled              the client disconnected
    ├── DeadlineExceeded
    ├── GenerationFailed       this job failed, the worker lives
    │   └── OutOfMemory
    ├── WorkerLost             the worker died or its CUDA context is lost; no retry
    └── StartupError           the service cannot start: one sentence and what to do
        └── FilesFault         the model's files are missing, or cannot be used

`Kind` crosses the pipe, and `app.api.errors` maps it to a status code. A message is for the client:
one plain sentence with the fix, never a traceback, path or address.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

SEE_LOG = "The picture could not be made; the service's log says why."
"""The message of a `GenerationFailed` whose cause nobody foresaw."""


class Kind(Enum):
    """What went wrong, independent of any protocol."""

    INVALID = "invalid"
    UNAUTHORIZED = "unauthorized"
    ORIGIN = "origin"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA = "unsupported_media"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
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
    """The base class: *kind* decides the status code, *message* is for the client.

    *param* is the field that is at fault, by the name that the raising room knows; *word* is a text
    of the client's in the message, which no log line may have.
    """

    kind = Kind.INTERNAL
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        kind: Kind | None = None,
        param: str | None = None,
        code: str | None = None,
        word: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or self.kind
        self.param = param
        self.code = code or self.code
        self.word = word
        self.retry_after_s = retry_after_s


def drop_frames(error: BaseException) -> None:
    """Drop the traceback and the context of *error*, which nobody will read.

    Their frames refer to what the request has read and made, and often to the error: a reference
    cycle that only the garbage collector frees.
    """
    error.__traceback__ = error.__context__ = None


class InvalidRequest(KleinError):
    """The request is invalid; *param* names the field, *code* is OpenAI's error code."""

    kind = Kind.INVALID
    code = "invalid_value"

    def rename(self, names: Mapping[str, str]) -> None:
        """Translate the field, and the message's first word, by *names*.

        The error stays the same object: another one would leave this one's traceback, and with it
        what the request has read, to the garbage collector.
        """
        subject, space, rest = self.message.partition(" ")
        self.message = names.get(subject, subject) + space + rest
        self.param = names.get(self.param or "", self.param)


class Unavailable(KleinError):
    """The service cannot take the job now; a retry after *retry_after_s* seconds may work."""

    kind = Kind.WORKER_DOWN

    @classmethod
    def because(cls, why: str, kind: Kind, retry_after_s: int) -> Unavailable:
        """Say *why*, and when to try again."""
        message = f"{why}; try again in {retry_after_s} s."
        return cls(message, kind=kind, retry_after_s=retry_after_s)


class Cancelled(KleinError):
    """The client disconnected, or the job was stopped."""

    kind = Kind.CANCELLED

    def __init__(self, message: str = "The request was cancelled.") -> None:
        super().__init__(message)


class DeadlineExceeded(KleinError):
    """The job was not finished at its deadline."""

    kind = Kind.DEADLINE


class GenerationFailed(KleinError):
    """This job failed; the worker goes on with the next."""

    kind = Kind.FAILED


class OutOfMemory(GenerationFailed):
    """The GPU had too little memory for this job, and the job's memory has been released."""

    kind = Kind.OUT_OF_MEMORY


class WorkerLost(KleinError):
    """The worker died, hung or lost its CUDA context; the job has failed and is not retried."""

    kind = Kind.FATAL


class StartupError(KleinError):
    """The service cannot start; the message says why and what to do about it."""

    kind = Kind.STARTUP


class FilesFault(StartupError):
    """The model's files are missing, damaged or of another model; the message may name paths."""


CLASSES: dict[Kind, type[KleinError]] = {
    Kind.INVALID: InvalidRequest,
    Kind.CANCELLED: Cancelled,
    Kind.DEADLINE: DeadlineExceeded,
    Kind.OUT_OF_MEMORY: OutOfMemory,
    Kind.FAILED: GenerationFailed,
    Kind.FATAL: WorkerLost,
    Kind.STARTUP: StartupError,
    Kind.QUEUE_FULL: Unavailable,
    Kind.LOADING: Unavailable,
    Kind.DRAINING: Unavailable,
    Kind.WORKER_DOWN: Unavailable,
}
"""The class of an error that crossed the pipe, by its kind; of all others it is `KleinError`."""
