"""The `Idempotency-Key` of a request, and a digest by which two requests' bodies are compared.

A form's boundary is drawn anew for each request, so it is left out of the digest.
"""

from __future__ import annotations

import hashlib
import re

from starlette.requests import Request
from starlette.types import Message

from app.api.schema.body import FORM, content_type, pieces
from app.api.schema.multipart import MAX_BOUNDARIES, boundary_of, damaged
from app.errors import InvalidRequest

KEY = "Idempotency-Key"
PATTERN = "[A-Za-z0-9_.-]{1,128}"


class StreamKey:
    """The key of a request, whose body it digests as it is read."""

    def __init__(self, request: Request, *, about: str) -> None:
        """*about* names what is asked for, since two routes may take the same body."""
        self.text = ", ".join(request.headers.getlist(KEY))
        """As it was sent; it may be malformed."""
        self._receive = request.receive
        self._boundary = boundary_of(request) if content_type(request) == FORM else b""
        self._is_read = False
        self._rest = b""
        """What may be the beginning of a boundary."""
        self._sha256 = hashlib.sha256(about.encode())

    def watch(self, request: Request) -> Request:
        """Return *request* in a form whose reader has the body digested."""
        return Request(request.scope, self._receive_some)

    def check(self) -> None:
        """Refuse a malformed key.

        Raises:
            InvalidRequest: with what is allowed.
        """
        if not re.fullmatch(PATTERN, self.text):
            raise InvalidRequest(
                f"{KEY} must be 1 to 128 letters from A to Z and a to z, digits, `_`, `.` and "
                "`-`, and be sent once.",
                param=KEY,
            )

    async def digest(self, watched: Request) -> bytes:
        """Return the digest of the body, of which nothing more is kept."""
        if not self._is_read:
            async for _ in pieces(watched):
                pass
        whole = self._sha256.copy()
        whole.update(self._rest)
        return whole.digest()

    async def _receive_some(self) -> Message:
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        self._add(message.get("body", b""))
        return message

    def _add(self, data: bytes) -> None:
        if not self._boundary:
            self._sha256.update(data)
            return
        *parts, rest = (self._rest + data).split(self._boundary, MAX_BOUNDARIES)
        if len(parts) == MAX_BOUNDARIES:
            raise damaged("it has too many parts")
        for part in parts:
            self._sha256.update(part + b"\0")
        end = max(0, len(rest) - len(self._boundary) + 1)
        self._sha256.update(rest[:end])
        self._rest = rest[end:]
