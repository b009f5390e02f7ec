"""Whose address a request comes from: the peer's, or what a declared proxy says of its own.

`X-Forwarded-For` is a list to which each proxy appends the address that it was asked from; what
stands to the left of the first entry by a proxy that we trust was written by whoever asked it. So
the list is read from the right, and only behind peers that the operator named. Anybody else,
loopback callers too, would choose an address for each request and so be no one's neighbour in the
queue.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable

from starlette.types import Scope

_log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNKNOWN = "address:unknown"

_MAX_HOPS = 32
_MAX_PEERS = 64
_IPV6_CLIENT_BITS = 64
"""What one subscriber is given at least; the addresses in it are his to choose."""


def client_of(address: str) -> str:
    """Name the client behind *address*: the IPv4 address, or the /64 of an IPv6 one; a text that is
    no address stands for itself.
    """
    found = _address(address)
    return address if found is None else _named(found)


class Proxies:
    """The proxies that the operator trusts, by address or network."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(each) for each in trusted)
        self._said: dict[Address, int] = {}
        self._has_warned = False

    def are(self, address: str) -> bool:
        """Whether *address* is one of them: behind it are many clients."""
        found = _address(address)
        return found is not None and self._trusts(found)

    def client(self, scope: Scope) -> str:
        """Name the client by its address, such as `address:192.0.2.7`; of IPv6, by its /64."""
        peer = _address(scope["client"][0]) if scope.get("client") else None
        if peer is None:
            return UNKNOWN
        said = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        if said and self._trusts(peer):
            peer = self._first_untrusted(peer, b",".join(said).decode("latin-1"))
        elif said:
            self._watch(peer, b",".join(said))
        return f"address:{_named(peer)}"

    def _first_untrusted(self, peer: Address, said: str) -> Address:
        """Go from proxy to proxy, as long as each is trusted; stop at what is no address."""
        hop = peer
        for text in said.split(",")[: -_MAX_HOPS - 1 : -1]:
            before = _address(_without_port(text.strip()))
            if before is None:
                break
            hop = before
            if not self._trusts(hop):
                break
        return hop

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)

    def _watch(self, peer: Address, said: bytes) -> None:
        """Warn once of a peer that looks like a proxy nobody declared: all behind it are one client
        to us.
        """
        if self._has_warned:
            return
        if self._said.setdefault(peer, hash(said)) != hash(said):
            self._has_warned = True
            self._said.clear()
            _log.warning(
                "%s sends different X-Forwarded-For addresses, which are ignored, so all its "
                "callers count as one client. If it is a proxy of yours, name it in "
                "KLEIN_TRUSTED_PROXIES.",
                peer,
            )
        elif len(self._said) > _MAX_PEERS:
            self._said.pop(next(iter(self._said)))


def _address(text: str) -> Address | None:
    """Read an address; IPv4 in IPv6's clothes is IPv4, and a zone is left out."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _without_port(text: str) -> str:
    """Some proxies write `192.0.2.7:4711`, or `[2001:db8::7]:4711`."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _named(address: Address) -> str:
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, _IPV6_CLIENT_BITS), strict=False))
