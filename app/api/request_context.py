"""The context of one request while it is answered, shared by middleware and routes.

The edge middleware makes it, middleware and routes write to it, the edge reads it once at the end.
Only one task at a time uses it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from app.errors import KleinError

_KEY = "klein.exchange"

Scope = MutableMapping[str, Any]


def _nothing() -> None:
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
    release_body: Callable[[], None] = _nothing
    """Called by a route that has read the body and keeps nothing of it."""
    outcome: str | None = None
    """Set where the status does not tell it, as in a health response."""

    def keep(self, error: KleinError) -> None:
        """Keep *error* without its traceback, cause and context.

        They refer to the request context, and so form a reference cycle that keeps whatever the
        request has read and made.
        """
        error.__traceback__ = error.__context__ = None
        self.error = error


def open_context(scope: Scope, context: RequestContext) -> None:
    """Attach *context* to the request."""
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    """Return the context of the request."""
    context: RequestContext = scope[_KEY]
    return context
