"""A request from its arrival to its jobs: the places and tokens that it holds meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from app.domain import (
    ImageSpec,
)
from app.errors import (
    DeadlineExceeded,
)
from app.images import OutputFormat
from app.jobs.queue import Places
from app.service.ticket import Ticket

if TYPE_CHECKING:
    from app.service.service import ImageService


class Admission:
    """One request from its arrival until its images wait for the GPU.

    Where a large body must be read or an image decoded first, its places are reserved before: they,
    and the tokens of the client's rate, are its own from then on. Leaving the `with` block gives
    back the places that no image took, but no token. The deadline counts from the arrival.
    """

    def __init__(
        self,
        service: ImageService,
        client: str,
        arrived_at: float,
        deadline_s: float | None,
        places: Places | None,
    ) -> None:
        self._service = service
        self._places = places
        self.client = client
        self.arrived_at = arrived_at
        self.deadline_s = deadline_s
        """The client's own limit, in seconds."""

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._places is not None:
            self._places.give_back()

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline of a request that takes no GPU time."""
        return self._service.seconds_left(self)

    def reserve(self, images: int) -> None:
        """Reserve a place for each of *images*, including the one that it may have, once.

        Raises:
            InvalidRequest: they would not fit into the empty queue either.
            Unavailable: there is no room for them now.
            DeadlineExceeded: the request took too long to arrive.
            KleinError: the client has exceeded its rate.
        """
        self._places = self._service.reserve(self, self._places, images)

    def submit(self, specs: Sequence[ImageSpec], output: OutputFormat) -> Ticket:
        """Queue all of *specs*, or none, in the places that were reserved for them or in others.

        Raises:
            InvalidRequest: a spec is beyond the limits, or the deadline shorter than the work.
            Unavailable: there is no room, or the deadline would pass before the last is done.
            DeadlineExceeded: the request took too long to arrive.
            KleinError: the client has exceeded its rate.
        """
        if self._places is not None and self._places.is_early:
            self.reserve(len(specs))
        return self._service.start(self, self._places, specs, output)


def too_slow() -> DeadlineExceeded:
    """Return the error for a request that took too long to arrive."""
    return DeadlineExceeded(
        "The request took so long to arrive and to be read that its deadline cannot be met; send "
        "it faster, send less, or allow more time."
    )
