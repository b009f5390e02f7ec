"""Host names as requests give them: the Host header's grammar, and which names are everybody's."""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::(\d{1,5}))?")
_EVERYWHERE = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})
"""Names of the machine itself: its own, and those that containers have for it."""
_LAST_PORT = 65_535


def parse_host(text: str) -> tuple[str, int | None] | None:
    """Parse a name and a port, or return None.

    The name is in lower case, without an IPv6 address's brackets and without a final dot.
    """
    match = _HOST.fullmatch(text.lower())
    if match is None:
        return None
    name, port = match[1].strip("[]").rstrip("."), int(match[2]) if match[2] else None
    is_address = match[1][0] != "[" or _is_address(name)
    return (name, port) if is_address and (port or 0) <= _LAST_PORT else None


def is_always_known(name: str) -> bool:
    """Whether *name*, as parsed, needs no permission: DNS rebinding can make none of them.

    It takes a name that the attacker's name server resolves, which no address is; and the machine's
    own names are resolved by itself.
    """
    return _is_address(name) or name in _EVERYWHERE or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
