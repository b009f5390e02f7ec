"""Jobs and a scripted backend for the queue's tests; no torch, no process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from app.domain import Generated, ImageSpec, Progress, RawImage, Stage, StageTimings
from app.jobs.job import Job

SPEC = ImageSpec("a red circle", 64, 64, 4, 1.0, 0)


def generated(spec: ImageSpec) -> Generated:
    """A finished picture for *spec* that took a tenth of a second."""
    return Generated(
        RawImage(spec.width, spec.height, b"\0" * (3 * spec.pixels)),
        StageTimings(0.0, 0.0, 0.1, 0.0),
        None,
        12,
        False,
    )


class ScriptedBackend:
    """Runs each job until the test says `finish`; remembers what ran and what was stopped."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.is_ready = asyncio.Event()
        self.is_ready.set()
        self._ends: dict[str, asyncio.Future[Exception | None]] = {}
        self._progress: dict[str, Callable[[Progress], None]] = {}
        self._started = asyncio.Condition()

    async def wait_until_ready(self) -> None:
        await self.is_ready.wait()

    async def run(
        self, job_id: str, spec: ImageSpec, on_progress: Callable[[Progress], None]
    ) -> Generated:
        self._ends[job_id] = asyncio.get_running_loop().create_future()
        self._progress[job_id] = on_progress
        async with self._started:
            self.started.append(job_id)
            self._started.notify_all()
        try:
            error = await self._ends[job_id]
        except asyncio.CancelledError:
            self.stopped.append(job_id)
            raise
        if error:
            raise error
        return generated(spec)

    def free(self, job_id: str) -> None:
        self._progress[job_id](Progress(Stage.GPU_FREE, 4, 4))

    def finish(self, job_id: str, error: Exception | None = None) -> None:
        self._ends[job_id].set_result(error)

    async def wait_for(self, *job_ids: str) -> None:
        """Return once exactly these have started, in this order."""
        async with self._started:
            await self._started.wait_for(lambda: self.started == list(job_ids))


MakeJobs = Callable[..., list[Job]]


@pytest.fixture
async def make_jobs() -> MakeJobs:
    def make(ids: Sequence[str], *, client: str = "", deadline_s: float = 60.0) -> list[Job]:
        loop = asyncio.get_running_loop()
        return [
            Job(
                id=name,
                spec=SPEC,
                client=client or name[0],
                deadline=loop.time() + deadline_s,
                future=loop.create_future(),
                predicted_s=2.0,
            )
            for name in ids
        ]

    return make
