"""CORS: which pages of other origins may ask this service and read its responses.

An origin is allowed if its bytes are those of an entry of `KLEIN_ALLOWED_ORIGINS`; no patterns, no
credentials: whoever has a key sends it in a header. `*` is accepted with keys only (`settings`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_EXPOSED = (
    "x-request-id, server-timing, retry-after, openai-processing-ms, "
    "x-klein-seed, x-klein-loras, x-klein-peak-vram-bytes, x-klein-warnings"
)
_METHODS = "GET, HEAD, POST, DELETE"
_MAX_AGE_S = 600
_MAX_NAMES = 1000
_HEADER_NAMES = re.compile(rf"[A-Za-z0-9_, -]{{1,{_MAX_NAMES}}}")


class Origins:
    """The origins that the operator allows."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(allowed)

    def allows(self, scope: Scope) -> bool:
        """Whether the request has one Origin header and it is allowed."""
        return self._find(scope) is not None

    def name(self, scope: Scope) -> bool:
        """Whether the request has one Origin header and it is listed by itself, not by `*`."""
        return self._find(scope) not in {None, "*"}

    def mark(self, scope: Scope, headers: MutableHeaders) -> None:
        """Let the page that sent the request read the response with *headers*, if it is allowed."""
        if self._allowed and "*" not in self._allowed:
            headers.add_vary_header("Origin")
        if found := self._find(scope):
            headers["access-control-allow-origin"] = found
            headers["access-control-expose-headers"] = _EXPOSED

    def _find(self, scope: Scope) -> str | None:
        sent = Headers(scope=scope).getlist("origin") if self._allowed else []
        if len(sent) != 1:
            return None
        if "*" in self._allowed:
            return "*"
        return sent[0] if sent[0] in self._allowed else None


class Preflights:
    """ASGI middleware: answers an allowed origin's preflight, which never carries a key."""

    def __init__(self, app: ASGIApp, *, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the preflight, or pass the request on."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            asked = Headers(scope=scope)
            if "access-control-request-method" in asked and self._origins.allows(scope):
                await _permission(asked)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _permission(asked: Headers) -> Response:
    headers = {
        "access-control-allow-methods": _METHODS,
        "access-control-max-age": str(_MAX_AGE_S),
    }
    # Clients send many of their own: openai-node has nine that begin with x-stainless.
    names = asked.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(names):
        headers["access-control-allow-headers"] = names
    return Response(status_code=204, headers=headers)
