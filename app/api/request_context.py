"""What is known of one request while it is answered, for the room's own parts to share.

The edge middleware makes it, whatever answers adds to it, the edge reads it once at the end. One
task at a time touches it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from app.errors import KleinError

_KEY = "klein.exchange"

Scope = MutableMapping[str, Any]


def _nothing() -> None:
    """Nobody counts."""


@dataclass(slots=True)
class RequestContext:
    """One request and what became of it; *client* is whom the queue is fair to."""

    id: str
    client: str = ""
    """`key:<digest>`, `address:<IPv4>` or `address:<IPv6 network>`; of whom limits are counted."""
    has_key: bool = False
    """Whether the request carried one of the configured keys."""
    error: KleinError | None = None
    release_body: Callable[[], None] = _nothing
    """Called by a route that has read the body and keeps nothing of it."""
    outcome: str | None = None
    """Set where the status does not tell it, as with a health answer."""

    def keep(self, error: KleinError) -> None:
        """Keep *error*, without the frames it came through and what it came from: they hold the
        exchange, and with it in a circle whatever the request has read and made.
        """
        error.__traceback__ = error.__context__ = None
        self.error = error


def open_context(scope: Scope, context: RequestContext) -> None:
    """Attach *exchange* to the request."""
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    """Read the exchange of the request."""
    context: RequestContext = scope[_KEY]
    return context
