"""What trusted proxies say of a request: the client's address, and the scheme and Host it used.

`X-Forwarded-For` is a list to which each proxy appends the address of its peer; entries to the left
of the first one that a trusted proxy appended may be forged. So the list is read from the right,
and only from declared proxies. Any other peer, loopback included, could send another
address with each request and so escape the limits per client.

`X-Forwarded-Proto` and `X-Forwarded-Host` are appended to as well, or overwritten. With as many
entries as there are addresses, the one at the client's place is that of the proxy it spoke to;
else the last one is the nearest proxy's, or the only one.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable

from starlette.types import Scope

from app.api.hosts import parse_host

_log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNKNOWN = "address:unknown"

_SCHEMES = frozenset({"http", "https"})
_MAX_HOPS = 32
_MAX_PEERS = 64
_IPV6_CLIENT_BITS = 64
"""The smallest prefix that a provider assigns; its subscriber may use any address in it."""


def client_of(address: str) -> str:
    """Name the client behind *address*: the IPv4 address, or the /64 network of an IPv6 one.

    A text that is no address is returned as it is.
    """
    found = _address(address)
    return address if found is None else _named(found)


class Proxies:
    """The proxies that the operator trusts, by address or network."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(each) for each in trusted)
        self._said: dict[Address, int] | None = {}
        """A hash of what each peer said; None once the operator is warned."""

    def are(self, address: str) -> bool:
        """Whether *address* is a trusted proxy, behind which are many clients."""
        return self._trusts(_address(address))

    def client(self, scope: Scope) -> str:
        """Name the client by its address, such as `address:192.0.2.7`; of IPv6, by its /64."""
        peer = _address(scope["client"][0]) if scope.get("client") else None
        if peer is None:
            return UNKNOWN
        if self._trusts(peer):
            peer, _ = self._first_untrusted(peer, _entries(scope, b"for"))
        elif said := _header(scope, b"for"):
            self._watch(peer, said)
        return f"address:{_named(peer)}"

    def seen(self, scope: Scope) -> tuple[str | None, str | None]:
        """Return the scheme and the Host that the client used, as trusted proxies tell them.

        None stands for what they do not tell, or not as a scheme or a Host.
        """
        peer = _address(scope["client"][0]) if scope.get("client") else None
        if peer is None or not self._trusts(peer):
            return None, None
        addresses = _entries(scope, b"for")
        _, hops = self._first_untrusted(peer, addresses)
        scheme, host = (
            _entry(_entries(scope, kind), max(1, hops), len(addresses))
            for kind in (b"proto", b"host")
        )
        return (
            scheme.lower() if scheme.lower() in _SCHEMES else None,
            host if parse_host(host) else None,
        )

    def _first_untrusted(self, peer: Address, said: list[str]) -> tuple[Address, int]:
        """Walk the list from the right past trusted proxies; stop at what is no address.

        The second value is how many entries were passed.
        """
        hops = 0
        for text in said[::-1]:
            before = _address(_without_port(text))
            if before is None or not self._trusts(peer):
                break
            peer, hops = before, hops + 1
        return peer, hops

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)

    def _watch(self, peer: Address, said: bytes) -> None:
        """Warn once of a peer that looks like an undeclared proxy.

        All clients behind it count as one.
        """
        if self._said is None:
            return
        if self._said.setdefault(peer, hash(said)) != hash(said):
            self._said = None
            _log.warning(
                "%s sends different X-Forwarded-For addresses, which are ignored, so all its "
                "callers count as one client. If it is a proxy of yours, name it in "
                "KLEIN_TRUSTED_PROXIES.",
                peer,
            )
        elif len(self._said) > _MAX_PEERS:
            self._said.pop(next(iter(self._said)))


def _header(scope: Scope, kind: bytes) -> bytes:
    """Return the value of the request's X-Forwarded headers of this kind, all in one."""
    name = b"x-forwarded-" + kind
    return b",".join(value for header, value in scope["headers"] if header == name)


def _entries(scope: Scope, kind: bytes) -> list[str]:
    """Return the last entries of the request's X-Forwarded headers of this kind."""
    said = _header(scope, kind)
    texts = said.decode("latin-1").rsplit(",", _MAX_HOPS)[-_MAX_HOPS:] if said else ()
    return [text.strip() for text in texts]


def _entry(entries: list[str], hop: int, addresses: int) -> str:
    """Return the entry that belongs to the *hop*-th address from the right."""
    if not entries:
        return ""
    return entries[-hop if len(entries) == addresses else -1]


def _address(text: str) -> Address | None:
    """Parse an address; an IPv4-mapped IPv6 one becomes IPv4, and a zone is removed."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _without_port(text: str) -> str:
    """Remove the port that some proxies add: `192.0.2.7:4711`, `[2001:db8::7]:4711`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _named(address: Address) -> str:
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, _IPV6_CLIENT_BITS), strict=False))
