"""Which pages may reach the card: under which names the service answers, and from which origins it
is asked.

A browser sends whatever a page tells it to, from inside the user's own network, so without keys
these two checks are all that stands between a web page and the card.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.api.exchange import exchange_of
from app.errors import InvalidRequest, Kind, KleinError

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FOREIGN_SITES = frozenset({b"cross-site", b"same-site"})


class HostGate:
    """ASGI: answers only under a known name, so that no web page reaches the card by DNS rebinding.

    A request that carries a configured key may use any name. A name with a syntax error is refused
    always.
    """

    def __init__(self, app: ASGIApp, *, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400, or pass the request on."""
        if scope["type"] != "http" or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = InvalidRequest(
            "The service is not known under this Host; add it to KLEIN_ALLOWED_HOSTS."
        )
        exchange_of(scope).error = error
        await error_response(error)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        asked = _host_of(scope)
        if asked is None:
            return False
        name = asked[0]
        return (
            # A link must work for whoever got it, under the name that a key made good; its own
            # name cannot be guessed, so a web page gains nothing by it.
            scope["path"].startswith("/v1/images/files/")
            or exchange_of(scope).has_key
            or "*" in self._names
            or name in self._names
            or _is_loopback(name)
        )


class OriginGate:
    """ASGI: refuses what a page of another origin sends, whether or not the page could read the
    answer.

    A form, and a `fetch` without CORS, need no one's leave to be sent, and a picture costs the same
    seconds of the card. A request that carries a configured key may come from anywhere: a page that
    knows the key has it from its owner. Requests without either header come from no browser.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        if scope["type"] != "http" or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = KleinError(
            "A page of another origin may not ask this service for anything; use the service's own "
            "page at /, or send an API key as `Authorization: Bearer <key>`. A proxy in front must "
            "pass the Host header on.",
            kind=Kind.ORIGIN,
        )
        exchange_of(scope).error = error
        await error_response(error)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        return (
            scope["method"] in _READING
            or exchange_of(scope).has_key
            or not any(
                _is_foreign(name, value.strip().lower(), scope) for name, value in scope["headers"]
            )
        )


def _is_foreign(name: bytes, value: bytes, scope: Scope) -> bool:
    """Whether a header, in lower case, says that another origin's page asks."""
    if name == b"sec-fetch-site":
        return value in _FOREIGN_SITES
    return name == b"origin" and not _is_own(value.decode("latin-1"), scope)


def _is_own(origin: str, scope: Scope) -> bool:
    """Whether *origin* has the host and port that the request was sent to, under any scheme: a
    proxy that speaks TLS asks us in plain HTTP.
    """
    scheme, separator, rest = origin.partition("://")
    match, asked = _HOST.fullmatch(rest), _host_of(scope)
    if not separator or match is None or asked is None:
        return False
    default = _DEFAULT_PORTS.get(scheme)
    port = int(match[2]) if match[2] else default
    name, asked_port = asked
    if _plain(match[1]) != name or port is None:
        return False
    # A Host without a port stands for the scheme's own, and we do not know the browser's scheme.
    return port == asked_port if asked_port is not None else port in _DEFAULT_PORTS.values()


def _host_of(scope: Scope) -> tuple[str, int | None] | None:
    """Read the only Host header: the name in lower case, and the port if there is one."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    match = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    return (_plain(match[1]), int(match[2]) if match[2] else None) if match else None


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
