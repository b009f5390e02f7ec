"""The middleware that refuses requests before any routing, with its checks of Host and Origin.

These are against DNS rebinding and cross-site requests; the check of keys is in `auth`. A browser
sends whatever a page tells it to, from inside the user's own network, so without keys they are all
that protects the GPU from a web page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import refusal
from app.api.hosts import is_always_known, parse_host
from app.api.middleware.auth import has_password
from app.api.middleware.cors import Origins
from app.api.middleware.target import HOSTS
from app.errors import InvalidRequest, Kind, KleinError
from app.request_context import current_request

_DEFAULT_PORTS = {"http": 80, "https": 443}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FOREIGN_SITES = frozenset({b"cross-site", b"same-site"})
_NAMELESS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""What probes and scrapes ask for, under whatever name a cluster has; it makes no picture."""

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
                    await refusal(scope, error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class HostCheck:
    """Refuses a request under a name that is not allowed: its Host, and what a proxy forwards.

    Addresses, and the names that a machine has for itself, are always allowed, as is no Host at all
    in HTTP/1.0: DNS rebinding needs a name. A request that carries a configured key may use any
    name. A malformed name is always refused, as are two Host headers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    def __call__(self, scope: Scope) -> KleinError | None:
        """Return the refusal: 400."""
        names = _names(scope)
        if names is not None and (_needs_no_name(scope) or all(map(self._knows, names))):
            return None
        return InvalidRequest(
            "The service is not known under this name. Use its IP address instead, or add the name "
            "to KLEIN_ALLOWED_HOSTS and start it again."
        )

    def _knows(self, name: str) -> bool:
        return "*" in self._names or name in self._names or is_always_known(name)


class OriginCheck:
    """Refuses a cross-origin request, even if the page cannot read the response.

    A form, and a `fetch` without CORS, are sent without a preflight, and an image costs the same
    GPU time. A request that carries a configured key may have any origin: a page that knows the key
    has it from its owner. A password does not count, nor does `*` beside one, since browsers add
    one that they remember to every page's requests. Requests without either header come from no
    browser.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins

    def __call__(self, scope: Scope) -> KleinError | None:
        """Return the refusal: 403."""
        if (
            scope["method"] in _READING
            or self._is_trusted(scope)
            or not any(
                _is_foreign(name, value.strip().lower(), scope) for name, value in scope["headers"]
            )
        ):
            return None
        return KleinError(
            "A page of another origin may not ask this service for anything; use the service's own "
            "page at /, send an API key as `Authorization: Bearer <key>`, or add the page's origin "
            "to KLEIN_ALLOWED_ORIGINS. A proxy in front must pass the Host header on.",
            kind=Kind.ORIGIN,
        )

    def _is_trusted(self, scope: Scope) -> bool:
        if has_password(scope["headers"]):
            return self._origins.name(scope)
        return current_request.get().has_key or self._origins.allows(scope)


def _needs_no_name(scope: Scope) -> bool:
    """Whether any name is good: a probe's, a key holder's, or that of an image's URL.

    The URL must work for whoever got it, under the host name that a key permitted; its file name
    cannot be guessed, so a web page gains nothing by it.
    """
    return (
        current_request.get().has_key
        or scope["path"] in _NAMELESS
        or str(scope["path"]).startswith("/v1/images/files/")
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
    found, asked = parse_host(rest), _host_of(scope)
    if not separator or found is None or asked is None or found[0] != asked[0]:
        return False
    port = _DEFAULT_PORTS.get(scheme) if found[1] is None else found[1]
    # A Host without a port means the scheme's default, and the browser's scheme is unknown.
    return port in _DEFAULT_PORTS.values() if asked[1] is None else port == asked[1]


def _host_of(scope: Scope) -> tuple[str, int | None] | None:
    """Parse the Host header, or the Host that a trusted proxy forwards in its place."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    return parse_host(hosts[0].decode("latin-1")) if len(hosts) == 1 else None


def _names(scope: Scope) -> set[str] | None:
    """Return the names that a request came under, received and forwarded ones.

    None where one is malformed, Host was sent twice, or HTTP/1.1 was spoken without it.
    """
    received = scope[HOSTS]
    parsed = [*map(parse_host, received)]
    # A forwarded name stands among the headers, of a request without Host too.
    if received or any(name == b"host" for name, _ in scope["headers"]):
        parsed.append(_host_of(scope))
    is_free = not received and scope["http_version"] == "1.0"
    if not (is_free or len(received) == 1) or None in parsed:
        return None
    return {each[0] for each in parsed if each is not None}
