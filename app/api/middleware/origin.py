"""The check of the Origin header, against cross-site requests.

A browser sends whatever a page tells it to, from inside the user's own network, so without keys
this check and the one of the host name are all that protects the GPU from a web page.
"""

from __future__ import annotations

from starlette.types import Scope

from app.api.middleware.host import HOST, host_of, plain_name
from app.errors import Kind, KleinError
from app.request_context import current_request

_DEFAULT_PORTS = {"http": 80, "https": 443}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_FOREIGN_SITES = frozenset({b"cross-site", b"same-site"})


def check_origin(scope: Scope) -> KleinError | None:
    """Return the refusal of a cross-origin request, 403, even if the page cannot read the response.

    A form, and a `fetch` without CORS, are sent without a preflight, and an image costs the same
    GPU time. A request that carries a configured key may have any origin: a page that knows the key
    has it from its owner. Requests without either header come from no browser.
    """
    if (
        scope["method"] in _READING
        or current_request.get().has_key
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
    match, asked = HOST.fullmatch(rest), host_of(scope)
    if not separator or match is None or asked is None:
        return False
    default = _DEFAULT_PORTS.get(scheme)
    port = int(match[2]) if match[2] else default
    name, asked_port = asked
    if plain_name(match[1]) != name or port is None:
        return False
    # A Host without a port means the scheme's default, and the browser's scheme is unknown.
    return port == asked_port if asked_port is not None else port in _DEFAULT_PORTS.values()
