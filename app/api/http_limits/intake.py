"""The bytes received on a connection and not parsed yet, and the framing of the next message.

llhttp cannot be stopped in the middle of what it is fed, and one read may hold ten thousand
requests. So it is fed in pieces that end where a message may end: at a blank line, or with the last
byte of a body whose length is known.
"""

from __future__ import annotations

from app.api.http_limits.refusals import Unreadable

PIECE_BYTES = 16 * 1024
_CHUNKED_PIECE_BYTES = 64
"""The least size of a piece of a chunked body.

A body of blank lines must not cost a call for each three bytes.
"""


class Intake:
    """A buffer of received bytes, in order; used from the event loop's thread only."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def __len__(self) -> int:
        return len(self._rest)

    def add(self, data: bytes) -> None:
        """Append *data*."""
        self._rest += data

    def put_back(self, data: bytes) -> None:
        """Prepend *data*, which was taken but not parsed."""
        self._rest[:0] = data

    def clear(self) -> None:
        """Discard all bytes."""
        self._rest.clear()

    def take(self, framing: Framing) -> bytes:
        """Return the next piece; empty where nothing is left.

        At most one message ends in it, or two at the edge of a read.
        """
        if framing.is_between:
            self._skip_line_ends()
        size = min(len(self._rest), PIECE_BYTES)
        if framing.left_bytes:
            size = min(size, framing.left_bytes)
        else:
            begin = _CHUNKED_PIECE_BYTES if framing.is_chunked else 0
            found = self._rest.find(b"\n\r\n", begin, size)
            size = size if found < 0 else found + 3
        piece = bytes(self._rest[:size])
        del self._rest[:size]
        return piece

    def _skip_line_ends(self) -> None:
        """Skip line ends between messages (RFC 9112 2.2): they do not extend a time limit."""
        count = len(self._rest) - len(self._rest.lstrip(b"\r\n"))
        del self._rest[:count]


class Framing:
    """The framing of the message that is being parsed: where its body ends (RFC 9112 6).

    There is one for each connection, reset with each message.
    """

    is_between: bool
    """Whether no message has begun since the end of the last one."""
    is_chunked: bool
    left_bytes: int
    """Bytes not received yet of a body with a Content-Length."""

    _length: int
    _has_coding: bool

    def __init__(self) -> None:
        self.end()

    def begin(self) -> None:
        """Begin a message, at its first byte."""
        self.is_between = False

    def add_header(self, name: bytes, value: bytes) -> None:
        """Take one header, its name in lower case.

        Raises:
            Unreadable: a transfer coding other than `chunked`, whose end is unknown, or a second
                one.
        """
        if name == b"content-length":
            self._length = int(value)  # llhttp refuses any but digits in range
        elif name == b"transfer-encoding":
            if self._has_coding or value.strip().lower() != b"chunked":
                raise Unreadable(
                    "Transfer-Encoding may be chunked, once, and nothing else; send the body "
                    "uncompressed."
                )
            self._has_coding = True

    def end_head(self, http_version: str) -> None:
        """End the head, and take the body's framing from its headers.

        Raises:
            Unreadable: a chunked body in another version than HTTP/1.1.
        """
        if self._has_coding and http_version != "1.1":
            raise Unreadable("Transfer-Encoding needs HTTP/1.1; send a Content-Length.")
        self.is_chunked = self._has_coding
        self.left_bytes = self._length

    def head_again(self) -> bytes:
        """Return a minimal head with the same framing; empty where no body follows."""
        if self.is_chunked:
            return b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        if self.left_bytes:
            return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % self.left_bytes
        return b""

    def end(self) -> None:
        """End the message."""
        self.is_between = True
        self.is_chunked = self._has_coding = False
        self.left_bytes = self._length = 0
