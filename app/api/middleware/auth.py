"""Authentication by keys, compared in constant time; all but a few paths need one.

Bearer keys go everywhere; on the paths of a dialect whose clients know nothing else, a key may be
the password of Basic authentication.

The decision is made on `scope["path"]` before any routing, so a path that no route knows is closed
too, and neither the Host header nor an odd spelling of a path can open one (CVE-2026-48710,
CVE-2026-48746).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import Scope

from app.api.proxies import Proxies
from app.errors import Kind, KleinError
from app.request_context import current_request

_OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready"})
_OPEN_PREFIXES = ("/static/", "/v1/images/files/")


class KeyRing:
    """The configured API keys, kept as SHA-256 digests only."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)
        self.is_empty = not self._digests
        """Whether no key is configured, so that no request needs one."""

    def find(
        self, headers: Iterable[tuple[bytes, bytes]], *, takes_passwords: bool = False
    ) -> str | None:
        """Return the client name of the configured key that *headers* carry, or None.

        Every candidate is compared with every key, so the time reveals nothing about the keys.
        """
        holder = None
        for candidate in _candidates(headers, takes_passwords=takes_passwords):
            presented = _digest(candidate)
            for known in self._digests:
                if hmac.compare_digest(presented, known):
                    holder = f"key:{known.hex()[:12]}"
        return holder


class KeyCheck:
    """Names the client, and refuses a request without a key that needs one."""

    def __init__(
        self,
        keys: KeyRing,
        proxies: Proxies,
        *,
        is_metrics_open: bool,
        password_prefixes: tuple[str, ...] = (),
    ) -> None:
        self._keys = keys
        self._password_prefixes = password_prefixes
        self._proxies = proxies
        self._open_paths = _OPEN_PATHS | ({"/metrics"} if is_metrics_open else set())

    def __call__(self, scope: Scope) -> KleinError | None:
        """Return the refusal: 401."""
        context = current_request.get()
        takes_passwords = scope["path"].startswith(self._password_prefixes)
        holder = self._keys.find(scope["headers"], takes_passwords=takes_passwords)
        context.has_key = holder is not None
        context.client = holder or self._proxies.client(scope)
        if (
            context.has_key
            or self._keys.is_empty
            or scope["path"] in self._open_paths
            or scope["path"].startswith(_OPEN_PREFIXES)
        ):
            return None
        also = ", or as the password of Basic authentication" if takes_passwords else ""
        return KleinError(
            f"This needs a valid API key; send it as `Authorization: Bearer <key>`{also}.",
            kind=Kind.UNAUTHORIZED,
        )


def has_password(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether *headers* carry Basic authentication."""
    return any(name == b"authorization" and _is_basic(value) for name, value in headers)


def _candidates(
    headers: Iterable[tuple[bytes, bytes]], *, takes_passwords: bool
) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"api-key":
            yield value.strip()
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()
        elif name == b"authorization" and takes_passwords and _is_basic(value):
            yield _password(value[6:])


def _is_basic(value: bytes) -> bool:
    return value[:6].lower() == b"basic "


def _password(encoded: bytes) -> bytes:
    """Decode the password; a text without a colon is one, since people type the key alone."""
    try:
        text = base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return b""
    user, colon, password = text.partition(b":")
    return password if colon else user


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
