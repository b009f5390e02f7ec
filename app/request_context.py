"""What is known of one request, in one context variable that its tasks share.

The edge middleware makes it; middleware, routes and the service write to it; log lines take its id,
and the edge writes the rest into the request's one line. The worker's side of the pipe sets one
with the id alone while it handles a message. Outside of a request there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from app.domain import Device, ImageSpec
from app.errors import KleinError, drop_frames


class Outcome(NamedTuple):
    """How a request ended: the label of its metrics, and the error's code where it is ours."""

    name: str
    fault: str | None = None


class Trace(Protocol):
    """The distributed trace that a request is part of."""

    id: str
    """32 hexadecimal digits."""

    def picture_made(
        self, model: str, spec: ImageSpec, seconds: Mapping[str, float], device: Device
    ) -> None:
        """Add a picture that *device* has made now; *seconds* by stage, with the `total`."""

    def settle(self, outcome: Outcome) -> None:
        """Say how the request ended; the first call counts."""


def nothing() -> None:
    """Do nothing: no middleware counts the body."""


@dataclass(slots=True)
class RequestContext:
    """One request and its outcome; *client* is the unit of the queue's fairness."""

    id: str
    client: str = ""
    """`key:<digest>`, `address:<IPv4>` or `address:<IPv6 network>`; limits are per client."""
    has_key: bool = False
    """Whether the request carried one of the configured keys."""
    error: KleinError | None = None
    release_body: Callable[[], None] = nothing
    """Called by a route that has read the body and keeps nothing of it."""
    outcome: str | None = None
    """Set where the status does not tell it, as in a health response."""
    notes: dict[str, float] = field(default_factory=dict)
    """Fields of the request's one log line: numbers, no strings."""
    loras: tuple[str, ...] = ()
    """Names of the adapters of its images, for the same line; the operator has given them."""
    trace: Trace | None = None
    """Where traces are sent and this request's is recorded."""

    def keep(self, error: KleinError) -> None:
        """Keep *error* without its traceback and context, which refer to the request context."""
        drop_frames(error)
        self.error = error


current_request: ContextVar[RequestContext] = ContextVar("current_request")
"""The request that this task works for; `get` fails outside of one, `get(None)` does not."""
