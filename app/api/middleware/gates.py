"""The middleware that refuses requests before any routing, by a list of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import KleinError
from app.request_context import current_request

Check = Callable[[Scope], KleinError | None]
"""Returns the error with which a request is refused, None where it may pass."""


class Gates:
    """ASGI middleware: answers with the first error that *checks* return, else passes it on."""

    def __init__(self, app: ASGIApp, *, checks: Iterable[Check]) -> None:
        self._app = app
        self._checks = tuple(checks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] == "http":
            for check in self._checks:
                if error := check(scope):
                    current_request.get().error = error
                    await error_response(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)
