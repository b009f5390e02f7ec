"""Take a job, run it on a worker, resolve its future: one job on its GPU at a time.

The next job starts as soon as the GPU is free, while the finished image is still being transferred.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from app.domain import Backend, Generated, Progress, Stage
from app.errors import SEE_LOG, Cancelled, GenerationFailed, KleinError
from app.jobs.estimate import Estimator
from app.jobs.job import Job, JobState
from app.jobs.queue import JobQueue
from app.jobs.taker import Taker

_log = logging.getLogger(__name__)


class Dispatcher:
    """Drives one backend from a queue, from which others may take too; cancel `run` to end it."""

    def __init__(
        self,
        queue: JobQueue,
        backend: Backend,
        estimator: Estimator,
        taker: Taker | None = None,
    ) -> None:
        self._queue = queue
        self._backend = backend
        self._estimator = estimator
        self._taker = taker or queue.takers[0]
        self._tasks: set[asyncio.Task[Generated]] = set()

    async def run(self) -> None:
        """Serve jobs until cancelled; then cancel the running ones and wait for them."""
        try:
            while True:
                await self._backend.wait_until_ready()
                await self._start(await self._queue.take(self._taker)).wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, job: Job) -> asyncio.Event:
        """Start *job* on the backend; the event is set once the GPU can take the next."""
        free = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            if progress.stage is Stage.GPU_FREE:
                free.set()
            job.step = progress.step
            if not job.future.done():
                job.on_progress(progress)

        task = asyncio.create_task(
            self._backend.run(job.id, job.spec, on_progress),
            name=f"job {job.id}",
            context=job.context,
        )
        job.cancel_running = task.cancel
        self._tasks.add(task)
        task.add_done_callback(partial(self._finish, job, free), context=job.context)
        if job.future.done():
            # The client disconnected after `take`, when there was no task to cancel yet.
            task.cancel()
        return free

    def _finish(self, job: Job, free: asyncio.Event, task: asyncio.Task[Generated]) -> None:
        """Resolve *job* with the outcome of *task*, exactly once."""
        self._tasks.discard(task)
        job.cancel_running = None
        if task.cancelled():
            job.fail(Cancelled())
        elif error := task.exception():
            if not isinstance(error, KleinError):
                _log.error("A job failed inside the service, job=%s.", job.id, exc_info=error)
                error = GenerationFailed(SEE_LOG)
            job.fail(error)
        else:
            result = task.result()
            self._estimator.learn(job.spec, result.timings.total)
            job.succeed(result)
        assert job.state is JobState.RUNNING
        self._queue.finish(job)
        free.set()
