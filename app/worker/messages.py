"""What crosses the pipe: frozen dataclasses of plain data, both ways. No exception objects, no
tensors."""

from __future__ import annotations

from dataclasses import dataclass

from app.domain import Generated, ImageSpec, LoadProgress, ModelInfo, Progress
from app.errors import Kind


@dataclass(frozen=True, slots=True)
class Generate:
    """Down: make this picture."""

    job_id: str
    spec: ImageSpec


@dataclass(frozen=True, slots=True)
class Cancel:
    """Down: nobody waits for this job any more; stop it at the next step."""

    job_id: str


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
    """Up: no picture, and why. After Kind.FATAL the worker leaves."""

    job_id: str
    kind: Kind
    message: str


ToWorker = Generate | Cancel | Stop
FromWorker = Loading | Ready | StartFailed | Stepped | Done | Failed
