"""What the service returns: images, events of a running job, and its own status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.domain import (
    ModelInfo,
    PeakMemory,
    Stage,
    WorkerStage,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished image, encoded. The keys of *seconds* are the stages of the metrics."""

    data: bytes = field(repr=False)
    format: str
    media_type: str
    width: int
    height: int
    seed: int
    seconds: Mapping[str, float]
    peak: PeakMemory | None
    prompt_tokens: int
    warnings: tuple[str, ...]
    latents: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Status:
    """The service's state, for /health and for people."""

    stage: WorkerStage
    is_ready: bool
    progress: float | None
    reason: str
    info: ModelInfo | None
    queue_size: int
    queue_capacity: int
    running: int
    estimated_wait_s: float
    worker_restarts: int


@dataclass(frozen=True, slots=True)
class Queued:
    """*position* jobs start before this one."""

    position: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """*step* of *steps* are done; *stage* is never `GPU_FREE`."""

    stage: Stage
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """An image decoded from the running latents, perhaps smaller than the final one."""

    index: int
    picture: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The finished image."""

    picture: Picture


TicketEvent = Queued | StepDone | Preview | Finished
