"""Allowed host names, so that no web page reaches the GPU by DNS rebinding."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import Scope

from app.errors import InvalidRequest, KleinError
from app.request_context import current_request

HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(\d{1,5}))?")


class HostCheck:
    """Refuses a Host header whose name is not allowed.

    A request that carries a configured key may use any name. A malformed name is always refused.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    def __call__(self, scope: Scope) -> KleinError | None:
        """Return the refusal: 400."""
        asked = host_of(scope)
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


def host_of(scope: Scope) -> tuple[str, int | None] | None:
    """Parse the only Host header: the name in lower case and the port; None if malformed."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    match = HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
    return (plain_name(match[1]), int(match[2]) if match[2] else None) if match else None


def plain_name(name: str) -> str:
    """Return *name* without an IPv6 address's brackets and a final dot."""
    return name.strip("[]").rstrip(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
