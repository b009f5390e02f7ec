"""One accepted request of n images, from submission to its images or its first error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from app.domain import (
    Progress,
    RawImage,
    Stage,
)
from app.errors import (
    Cancelled,
)
from app.images import OutputFormat
from app.jobs.job import Job
from app.service.results import Finished, Picture, Preview, Queued, StepDone, TicketEvent

if TYPE_CHECKING:
    from app.service.service import ImageService


class Ticket:
    """One accepted request of n images. Await `pictures`, or read `events` where n is 1."""

    def __init__(self, service: ImageService, jobs: Sequence[Job], output: OutputFormat) -> None:
        self._service = service
        self._jobs = jobs
        self._output = output

    def cancel(self) -> None:
        """Cancel its jobs: waiting ones never run, running ones stop at the next denoising step."""
        self._service.cancel(self._jobs)

    async def pictures(self) -> list[Picture]:
        """Wait for all images, in the order of the specs.

        Cancelling the call cancels the jobs.

        Raises:
            KleinError: the first error; the other jobs are cancelled.
        """
        # No task group: its frame and the error that cancels it reference one another, and with
        # them every image so far, until the garbage collector runs.
        finishing = [
            asyncio.create_task(self._service.finish(job, self._output)) for job in self._jobs
        ]
        try:
            await asyncio.wait(finishing, return_when=asyncio.FIRST_EXCEPTION)
            if error := _first_error(finishing):
                raise error
            return [task.result() for task in finishing]
        finally:
            error = None
            self.cancel()
            await _end(finishing)

    async def events(self) -> AsyncGenerator[TicketEvent, None]:
        """Yield the events of the only job, `Finished` last; closing the iterator cancels it.

        Raises:
            KleinError: the job failed.
        """
        (job,) = self._jobs
        moved: asyncio.Queue[Progress | None] = asyncio.Queue()
        job.on_progress = moved.put_nowait
        finishing = asyncio.ensure_future(self._service.finish(job, self._output))
        finishing.add_done_callback(lambda task: moved.put_nowait(None))
        previews = 0
        try:
            yield Queued(self._service.position(job))
            while (progress := await moved.get()) is not None:
                if progress.stage is not Stage.GPU_FREE:
                    yield StepDone(progress.stage, progress.step, progress.steps)
                if progress.preview is not None:
                    yield await self._preview(progress.preview, previews)
                    previews += 1
            yield Finished(await finishing)
        finally:
            self.cancel()
            await _end([finishing])
            del finishing, job

    async def _preview(self, image: RawImage, index: int) -> Preview:
        data = await self._service.encode(image, self._output, {})
        return Preview(index, data, self._output.media_type)


def _first_error(tasks: Sequence[asyncio.Task[Picture]]) -> BaseException | None:
    """Return the error of the first of *tasks* to fail; those that followed are `Cancelled`."""
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    own = [error for error in errors if error is not None and not isinstance(error, Cancelled)]
    return next(iter(own), next(filter(None, errors), None))


async def _end(tasks: list[asyncio.Task[Picture]]) -> None:
    """Cancel all of *tasks*, wait until they have ended, and drop them and their errors."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
    tasks.clear()
