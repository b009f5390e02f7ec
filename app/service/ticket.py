"""A request from its arrival to its end: an `Admission` at first, a `Ticket` once it is accepted.

Each holds what the request has taken of the service meanwhile, and gives it back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from app.domain import Generated, ImageSpec, Progress, Stage
from app.errors import Cancelled, KleinError, drop_frames
from app.images import OutputFormat
from app.jobs.job import Job
from app.jobs.queue import JobQueue, Places
from app.service.results import Advance, Picture, Preview, Queued, TicketEvent, Waking

if TYPE_CHECKING:
    from app.service.service import ImageService


@dataclass(eq=False)
class Admission:
    """One request from its arrival until its images wait for the GPU.

    Where a large body must be read or an image decoded first, its *places* are reserved before:
    they, and the tokens of the client's rate, are its own from then on. Leaving the `with` block
    gives back the places that no image took, but no token. The deadline counts from the arrival.
    """

    service: ImageService = field(repr=False)
    queue: JobQueue
    client: str
    arrived_at: float
    deadline_s: float | None
    """The client's own limit, in seconds."""
    places: Places | None
    warnings: tuple[str, ...] = ()
    """What the client should know of its request; each image comes with it."""

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *error: object) -> None:
        if self.places is not None:
            self.queue.give_back(self.places)

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline of a request that takes no GPU time."""
        return self.service.seconds_left(self)

    def reserve(self, images: int) -> None:
        """Reserve a place for each of *images*, including the one that it may have, once.

        Raises:
            InvalidRequest: they would not fit into the empty queue either.
            Unavailable: there is no room for them now.
            DeadlineExceeded: the request took too long to arrive.
            KleinError: the client has exceeded its rate.
        """
        self.service.reserve(self, images)

    def submit(self, specs: Sequence[ImageSpec], output: OutputFormat) -> Ticket:
        """Queue all of *specs*, or none, in the places that were reserved for them or in others.

        Raises:
            InvalidRequest: a spec is beyond the limits, or the deadline shorter than the work.
            Unavailable: there is no room, or the deadline would pass before the last is done.
            DeadlineExceeded: the request took too long to arrive.
            KleinError: the client has exceeded its rate.
        """
        if self.places is not None and self.places.is_early:
            self.reserve(len(specs))
        return self.service.start(self, specs, output)


@dataclass(eq=False)
class Ticket:
    """One accepted request of n images. Await `pictures`, or read `events`."""

    service: ImageService = field(repr=False)
    queue: JobQueue
    jobs: Sequence[Job]
    output: OutputFormat
    request_id: str = ""
    created: float = field(default_factory=time.time)
    """In seconds since 1970."""

    @property
    def id(self) -> str:
        """The ticket's id, that of its first job."""
        return self.jobs[0].id

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.jobs[0].client

    def advance(self) -> Advance:
        """Return how far it has come."""
        left = [job for job in self.jobs if not job.future.done()]
        return Advance(
            images=len(self.jobs),
            done=len(self.jobs) - len(left),
            step=next((job.step for job in left if job.step), 0),
            steps=self.jobs[0].spec.num_inference_steps,
        )

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have *callback* called, once or more, when all of its jobs have ended."""
        for job in self.jobs:
            job.future.add_done_callback(partial(self._on_done, callback))

    def _on_done(self, callback: Callable[[], None], future: asyncio.Future[Generated]) -> None:
        if all(job.future.done() for job in self.jobs):
            callback()

    def cancel(self) -> None:
        """Cancel its jobs: waiting ones never run, running ones stop at the next denoising step."""
        for job in self.jobs:
            self.queue.cancel(job)

    async def pictures(self) -> list[Picture]:
        """Wait for all images, in the order of the specs.

        Cancelling the call cancels the jobs.

        Raises:
            KleinError: the first error; the other jobs are cancelled.
        """
        # No task group: its frame and the error that cancels it reference one another, and with
        # them every image so far, until the garbage collector runs.
        finishing = [
            asyncio.create_task(self.service.finish(job, self.output)) for job in self.jobs
        ]
        error = None
        try:
            await asyncio.wait(finishing, return_when=asyncio.FIRST_EXCEPTION)
            if error := _first_error(finishing):
                raise error
            return [task.result() for task in finishing]
        finally:
            self.cancel()
            # Given up before the wait, which may be cancelled: the error refers to this frame.
            ending = _end(finishing, raised=error)
            error = None
            await ending

    async def events(self) -> AsyncGenerator[tuple[int, TicketEvent], None]:
        """Yield each job's index and event, as they happen; a job's `Picture` is its last.

        Closing the iterator cancels the jobs.

        Raises:
            KleinError: the first error, once the pictures that were made before it have come; the
                other jobs are cancelled.
        """
        moved: asyncio.Queue[tuple[int, Progress | None]] = asyncio.Queue()
        finishing = {}
        for index, job in enumerate(self.jobs):
            job.on_progress = partial(_tell, moved, index)
            task = asyncio.create_task(self.service.finish(job, self.output))
            task.add_done_callback(partial(_tell_end, moved, index))
            finishing[index] = task
        del job, task
        previews = [0] * len(self.jobs)
        errors: list[KleinError] = []
        try:
            for index, waits in self._waiting():
                yield index, waits
            while finishing:
                index, progress = await moved.get()
                if progress is None:
                    try:
                        picture = await finishing.pop(index)
                    except KleinError as error:
                        errors.append(error)
                        self.cancel()
                    else:
                        yield index, picture
                    continue
                if progress.stage is not Stage.GPU_FREE:
                    yield index, progress
                if progress.preview is not None:
                    yield index, Preview(previews[index], await self._encode(index, progress))
                    previews[index] += 1
            if errors:
                raise errors.pop(0)
        finally:
            _drop(errors)
            self.cancel()
            await _end([*finishing.values()])
            finishing.clear()

    def _waiting(self) -> list[tuple[int, TicketEvent]]:
        """Return what the jobs wait for: their places, and the wake, told with the first."""
        found: list[tuple[int, TicketEvent]] = [
            (index, Queued(self.queue.position(job))) for index, job in enumerate(self.jobs)
        ]
        if (seconds := self.service.wakes_in_s()) is not None:
            found.append((0, Waking(seconds)))
        return found

    async def _encode(self, index: int, progress: Progress) -> bytes:
        assert progress.preview is not None
        scaled_to = self.jobs[index].spec.scaled_to
        return await self.service.encode(progress.preview, self.output, {}, scaled_to)


class Tickets:
    """Tickets until their jobs have ended, by client and in the order in which they were added."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Ticket]] = {}

    def add(self, ticket: Ticket) -> None:
        """Keep *ticket* until its end."""
        self._of.setdefault(ticket.client, {})[ticket.id] = ticket
        ticket.on_end(partial(self._remove, ticket.client, ticket.id))

    def of(self, client: str) -> list[Ticket]:
        """Return those of *client*."""
        return list(self._of.get(client, {}).values())

    def find(self, client: str, id: str) -> Ticket | None:
        """Return the one of *client* that has this *id*; there may be another client's."""
        return self._of.get(client, {}).get(id)

    def _remove(self, client: str, id: str) -> None:
        left = self._of.get(client, {})
        left.pop(id, None)
        if not left:
            self._of.pop(client, None)


def _tell(
    moved: asyncio.Queue[tuple[int, Progress | None]], index: int, progress: Progress
) -> None:
    moved.put_nowait((index, progress))


def _tell_end(
    moved: asyncio.Queue[tuple[int, Progress | None]], index: int, task: asyncio.Task[Picture]
) -> None:
    moved.put_nowait((index, None))


def _first_error(tasks: Sequence[asyncio.Task[Picture]]) -> BaseException | None:
    """Return the error of the first of *tasks* to fail; those that followed are `Cancelled`."""
    errors = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    own = [error for error in errors if error is not None and not isinstance(error, Cancelled)]
    return next(iter(own), next(filter(None, errors), None))


def _drop(errors: list[KleinError]) -> None:
    """Drop *errors*, which nobody will read; each refers to the frame that holds them."""
    for error in errors:
        drop_frames(error)
    errors.clear()


async def _end(tasks: list[asyncio.Task[Picture]], *, raised: BaseException | None = None) -> None:
    """Cancel all of *tasks*, wait until they have ended, and drop them and their errors.

    The frames of *raised*, which the caller raises, are left to whoever catches it.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None and error is not raised:
            drop_frames(error)
    tasks.clear()
