"""The settings that the routes read: frozen values, made once by the app factory."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from app.images.preparing import AUTO


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Switches of the HTTP API."""

    is_strict: bool
    """Whether a field that no route knows is refused."""
    has_aliases: bool
    """Whether OpenAI's model names stand for the served model."""
    lists_aliases: bool
    has_links: bool
    """Whether `response_format=url` is possible."""
    public_url: str | None
    """What the service's own URLs begin with; None takes the request's scheme and host."""
    heartbeat_s: float
    """Seconds of silence after which a stream sends a comment."""
    repaints: str = AUTO
    """Which pixels a mask repaints: `AUTO` or `TRANSPARENT` of `app.images.preparing`."""

    def own_url(self, request: Request) -> str:
        """Return what the service's own URLs begin with, for whoever sent *request*."""
        if self.public_url:
            return self.public_url
        if "host" in request.headers:
            return str(request.base_url).rstrip("/")
        # HTTP/1.0 may leave Host out; the socket's address is nobody else's business.
        return f"http://localhost:{request.scope['server'][1]}"
