"""The middleware that refuses requests before any routing, with its checks of Host and Origin.

These are against DNS rebinding and cross-site requests; the check of keys is in `auth`. A browser
sends whatever a page tells it to, from inside the user's own network, so without keys they are all
that protects the GPU from a web page.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.api.middleware.auth import has_password
from app.errors import InvalidRequest, Kind, KleinError
from app.request_context import current_request

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FOREIGN_SITES = frozenset({b"cross-site", b"same-site"})

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
                    await error_response(error, scope)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class HostCheck:
    """Refuses a Host header whose name is not allowed.

    A request that carries a configured key may use any name. A malformed name is always refused.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    def __call__(self, scope: Scope) -> KleinError | None:
        """Return the refusal: 400."""
        asked = _host_of(scope)
        if asked is not None and (
            # An image's URL must work for whoever got it, under the host name that a key permitted;
            # its file name cannot be guessed, so a web page gains nothing by it.
            scope["path"].startswith("/v1/images/files/")
            or current_request.get().has_key
            or "*" in self._names
            or asked[0] in self._names
            or _is_loopback(asked[0])
        ):
            return None
        return InvalidRequest(
            "The service is not known under this Host; add it to KLEIN_ALLOWED_HOSTS."
        )


def check_origin(scope: Scope) -> KleinError | None:
    """Return the refusal of a cross-origin request, 403, even if the page cannot read the response.

    A form, and a `fetch` without CORS, are sent without a preflight, and an image costs the same
    GPU time. A request that carries a configured key may have any origin: a page that knows the key
    has it from its owner. A password does not count: browsers add one that they remember to every
    page's requests. Requests without either header come from no browser.
    """
    if (
        scope["method"] in _READING
        or (current_request.get().has_key and not has_password(scope["headers"]))
        or not any(
            _is_foreign(name, value.strip().lower(), scope) for name, value in scope["headers"]
        )
    ):
        return None
    return KleinError(
        "A page of another origin may not ask this service for anything; use the service's own "
        "page at /, or send an API key as `Authorization: Bearer <key>`. A proxy in front must "
        "pass the Host header on.",
        kind=Kind.ORIGIN,
    )


def _is_foreign(name: bytes, value: bytes, scope: Scope) -> bool:
    """Whether the header *name*, in lower case, says that the request is cross-origin."""
    if name == b"sec-fetch-site":
        return value in _FOREIGN_SITES
    return name == b"origin" and not _is_own(value.decode("latin-1"), scope)


def _is_own(origin: str, scope: Scope) -> bool:
    """Whether *origin* has the host and port that the request was sent to.

    The scheme is ignored: a proxy that terminates TLS forwards plain HTTP.
    """
    scheme, separator, rest = origin.partition("://")
    found, asked = _parse(rest), _host_of(scope)
    if not separator or found is None or asked is None or found[0] != asked[0]:
        return False
    port = _DEFAULT_PORTS.get(scheme) if found[1] is None else found[1]
    # A Host without a port means the scheme's default, and the browser's scheme is unknown.
    return port in _DEFAULT_PORTS.values() if asked[1] is None else port == asked[1]


def _host_of(scope: Scope) -> tuple[str, int | None] | None:
    """Parse the only Host header; None where there is another number of them."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    return _parse(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None


def _parse(text: str) -> tuple[str, int | None] | None:
    """Parse a name, without an IPv6 address's brackets and a final dot, and a port; or None."""
    match = _HOST.fullmatch(text)
    if match is None:
        return None
    return match[1].strip("[]").rstrip("."), int(match[2]) if match[2] else None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
