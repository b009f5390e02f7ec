"""The bytes received on a connection and not parsed yet, and the framing of the next message.

llhttp cannot be stopped in the middle of what it is fed, and one read may hold ten thousand
requests. So it is fed in pieces that end where a message may end: at a blank line, or with the last
byte of a body whose length is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.api.http_limits.refusals import Unreadable

PIECE_BYTES = 16 * 1024
_CHUNKED_PIECE_BYTES = 64
"""The least size of a piece of a chunked body.

A body of blank lines must not cost a call for each three bytes.
"""


class Intake(bytearray):
    """A buffer of received bytes, in order; used from the event loop's thread only."""

    def take(self, framing: Framing) -> bytes:
        """Remove and return the next piece; empty where nothing is left.

        At most one message ends in it, or two at the edge of a read.
        """
        if framing.is_between:
            # Line ends between messages (RFC 9112 2.2) do not extend a time limit.
            del self[: len(self) - len(self.lstrip(b"\r\n"))]
        size = min(len(self), PIECE_BYTES)
        if framing.left_bytes and not framing.is_in_head:
            size = min(size, framing.left_bytes)
        else:
            is_in_chunks = framing.is_chunked and not framing.is_in_head
            found = self.find(b"\n\r\n", _CHUNKED_PIECE_BYTES if is_in_chunks else 0, size)
            size = size if found < 0 else found + 3
        piece = bytes(self[:size])
        del self[:size]
        return piece


@dataclass(slots=True)
class Framing:
    """The framing of the message that is being parsed: where its body ends (RFC 9112 6)."""

    is_between: bool = False
    """Whether no message has begun since the end of the last one."""
    is_in_head: bool = False
    is_chunked: bool = False
    left_bytes: int = 0
    """Bytes not received yet of a body with a Content-Length."""

    def add_header(self, name: bytes, value: bytes) -> None:
        """Take one header, its name in lower case.

        Raises:
            Unreadable: a transfer coding other than `chunked`, whose end is unknown, or a second
                one.
        """
        if name == b"content-length":
            self.left_bytes = int(value)  # llhttp refuses any but digits in range
        elif name == b"transfer-encoding":
            if self.is_chunked or value.strip().lower() != b"chunked":
                raise Unreadable(
                    "Transfer-Encoding may be chunked, once, and nothing else; send the body "
                    "uncompressed."
                )
            self.is_chunked = True

    def head_again(self) -> bytes:
        """Return a minimal head with the same framing; empty where no body follows."""
        if self.is_chunked:
            return b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        if self.left_bytes:
            return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % self.left_bytes
        return b""
