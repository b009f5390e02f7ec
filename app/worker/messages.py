"""Messages over the pipe, both ways: frozen dataclasses of plain data.

No exception objects, no tensors. "Down" is from the parent to the worker, "up" the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.domain import Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.errors import CLASSES, Kind, KleinError


@dataclass(frozen=True, slots=True)
class Generate:
    """Down: generate this image; *request_id* names the request in the worker's log."""

    job_id: str
    spec: ImageSpec
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Down: cancel this job at the next denoising step."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Down: answer with `Pong` once the jobs before this have ended."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Down: finish the running job and exit."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Up: the model cannot be loaded; the worker exits after this.

    *is_of_files* where the model's files are at fault, and no card.
    """

    message: str
    is_of_files: bool = False


@dataclass(frozen=True, slots=True)
class Pong:
    """Up: the answer to `Ping`; the engine's thread, the receiver and the sender are alive."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Up: progress of the running job."""

    job_id: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Done:
    """Up: the finished image."""

    job_id: str
    generated: Generated


@dataclass(frozen=True, slots=True)
class Failed:
    """Up: the job's error, as plain data; Kind.FATAL ends the worker."""

    job_id: str
    kind: Kind
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @classmethod
    def of(cls, job_id: str, error: KleinError) -> Failed:
        """Convert *error* to plain data."""
        return cls(job_id, error.kind, error.message, error.param, error.code, error.retry_after_s)

    def error(self) -> KleinError:
        """Rebuild the error: the class of its kind, with all attributes."""
        error = CLASSES.get(self.kind, KleinError)(self.message)
        error.kind, error.param, error.code = self.kind, self.param, self.code
        error.retry_after_s = self.retry_after_s
        return error


ToWorker = Generate | Cancel | Ping | Stop
FromWorker = LoadProgress | ModelInfo | StartFailed | Pong | Stepped | Done | Failed
"""`ModelInfo` says that the model is loaded and warm."""
