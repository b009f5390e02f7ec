"""What has come on a connection and was not parsed yet, and how the next message's body ends.

llhttp cannot be stopped in the middle of what it is fed, and one read may hold ten thousand
requests. So it is fed in pieces that end where a message may end: at a blank line, or with the last
byte of a body whose length is known.
"""

from __future__ import annotations

from app.api.http_limits.refusals import Unreadable

PIECE_BYTES = 16 * 1024
_CHUNKED_PIECE_BYTES = 64
"""At least so much of a body in chunks at a time: a body of blank lines must not cost a call for
each three bytes."""


class Intake:
    """Bytes in the order of their arrival. Used from the event loop's thread only."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def __len__(self) -> int:
        return len(self._rest)

    def add(self, data: bytes) -> None:
        """Put *data* behind what is there."""
        self._rest += data

    def put_back(self, data: bytes) -> None:
        """Put *data*, which was taken too much, before what is there."""
        self._rest[:0] = data

    def clear(self) -> None:
        """Throw everything away."""
        self._rest.clear()

    def take(self, framing: Framing) -> bytes:
        """The next piece, in which at most one message ends, or two at a read's edge; empty where
        nothing is left.
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
        """Line ends between messages belong to none (RFC 9112 2.2): they are no sign of life."""
        count = len(self._rest) - len(self._rest.lstrip(b"\r\n"))
        del self._rest[:count]


class Framing:
    """Where the message that is being parsed ends: one for each connection, begun anew with each
    message.
    """

    is_between: bool
    """Whether no message has begun since the last one's end."""
    is_chunked: bool
    left_bytes: int
    """Of a body whose length is known: what has not come yet."""

    _length: int
    _has_coding: bool

    def __init__(self) -> None:
        self.end()

    def begin(self) -> None:
        """A message's first byte has come."""
        self.is_between = False

    def add_header(self, name: bytes, value: bytes) -> None:
        """Learn from one header, its name in lower case.

        Raises:
            Unreadable: a coding besides `chunked`, whose end we would guess, or a second one.
        """
        if name == b"content-length":
            self._length = int(value)  # digits and in range, or llhttp had refused it
        elif name == b"transfer-encoding":
            if self._has_coding or value.strip().lower() != b"chunked":
                raise Unreadable(
                    "Transfer-Encoding may be chunked, once, and nothing else; send the body "
                    "uncompressed."
                )
            self._has_coding = True

    def end_head(self, http_version: str) -> None:
        """The head is whole.

        Raises:
            Unreadable: chunks in a version that does not know them.
        """
        if self._has_coding and http_version != "1.1":
            raise Unreadable("Transfer-Encoding needs HTTP/1.1; send a Content-Length.")
        self.is_chunked = self._has_coding
        self.left_bytes = self._length

    def head_again(self) -> bytes:
        """A small head with the same framing; empty where no body follows."""
        if self.is_chunked:
            return b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        if self.left_bytes:
            return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % self.left_bytes
        return b""

    def end(self) -> None:
        """The message is whole."""
        self.is_between = True
        self.is_chunked = self._has_coding = False
        self.left_bytes = self._length = 0
