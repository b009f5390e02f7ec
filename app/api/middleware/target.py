"""The middleware that gives a request's target one form, before any check or route reads it.

Clients join a base URL and a path with a slash too many or end with one, ask with HEAD, and come
through proxies that know the scheme and the name better. Whatever is decided by a path or a name
must be decided by the one that is served: so all of this happens once, in front of the checks.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.proxies import Proxies

HOSTS = "klein.hosts"
"""The scope's key for the received values of Host: a proxy may forward another one."""
_SLASHES = re.compile("/{2,}")


class Target:
    """ASGI middleware: passes a request on with its path, method, scheme and Host in one form.

    The path has no doubled and no trailing slash, HEAD becomes GET (the server sends no body for
    it), and scheme and Host are those that *proxies* forward, if any.
    """

    def __init__(self, app: ASGIApp, *, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; the route that it finds is told to those outside too."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inner = self._settle(scope)
        try:
            await self._app(inner, receive, send)
        finally:
            inner.pop("extensions", None)  # it holds the connection, which must not outlive its end
            if "route" in inner:
                scope["route"] = inner["route"]

    def _settle(self, scope: Scope) -> dict[str, Any]:
        scheme, host = self._proxies.seen(scope)
        received = [value for name, value in scope["headers"] if name == b"host"]
        inner = {
            **scope,
            "path": settled_path(scope["path"]),
            "method": "GET" if scope["method"] == "HEAD" else scope["method"],
            "scheme": scheme or scope["scheme"],
            HOSTS: tuple(value.decode("latin-1") for value in received),
        }
        if host is not None:
            others = [pair for pair in scope["headers"] if pair[0] != b"host"]
            inner["headers"] = [(b"host", host.encode("latin-1")), *others]
        return inner


def settled_path(path: str) -> str:
    """Return *path* in the one form by which routes are found."""
    return _SLASHES.sub("/", path).removesuffix("/") or "/"
