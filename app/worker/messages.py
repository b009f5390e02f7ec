"""What crosses the pipe: frozen dataclasses of plain data, both ways. No exception objects, no
tensors."""

from __future__ import annotations

from dataclasses import dataclass

from app.domain import Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.errors import Kind, KleinError, from_kind


@dataclass(frozen=True, slots=True)
class Generate:
    """Down: make this picture; *request_id* names the request in the worker's log."""

    job_id: str
    spec: ImageSpec
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Down: nobody waits for this job any more; stop it at the next step."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Down: answer with `Pong` once the jobs before this have ended."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Down: finish the running job and leave."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Up: how far the model has come."""

    progress: LoadProgress


@dataclass(frozen=True, slots=True)
class Ready:
    """Up: the model answers."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Up: the model cannot be loaded; the worker leaves after this."""

    message: str


@dataclass(frozen=True, slots=True)
class Pong:
    """Up: the thread that makes pictures, and those that receive and send, do their work."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Up: a sign of life of the running job."""

    job_id: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Done:
    """Up: the picture."""

    job_id: str
    generated: Generated


@dataclass(frozen=True, slots=True)
class Failed:
    """Up: no picture, and why: what `app.errors.from_kind` needs. After Kind.FATAL the worker
    leaves."""

    job_id: str
    kind: Kind
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @classmethod
    def of(cls, job_id: str, error: KleinError) -> Failed:
        """Say *error* without the exception object."""
        return cls(job_id, error.kind, error.message, error.param, error.code, error.retry_after_s)

    def error(self) -> KleinError:
        """Build the error again."""
        return from_kind(
            self.kind,
            self.message,
            param=self.param,
            code=self.code,
            retry_after_s=self.retry_after_s,
        )


ToWorker = Generate | Cancel | Ping | Stop
FromWorker = Loading | Ready | StartFailed | Pong | Stepped | Done | Failed
