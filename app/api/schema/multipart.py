"""An incremental reader of `multipart/form-data`: texts and files in memory, always in UTF-8.

Starlette's own reader lets the client choose a codec, and some of Python's take minutes for a
megabyte; it keeps files in spooled temporary files, which are copied twice. This one has only what
a form with images needs, on the same parser. The parser is fed small pieces, so it blocks the event
loop for milliseconds at most.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import (
    MultipartParser,
    MultipartState,
    parse_options_header,
)

from app.api.schema.body import pieces
from app.errors import InvalidRequest
from app.limits import MAX_PROMPT

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FILES = 64
MAX_FIELDS = 64
MAX_TEXT_BYTES = 4 * MAX_PROMPT
"""Bytes of one text: of the longest prompt in UTF-8."""
MAX_TEXTS_BYTES = 4 * MAX_TEXT_BYTES
"""Bytes of all texts together; as Python strings they may be five times as large."""
MAX_NAME_BYTES = 1024
_MAX_TYPE_LENGTH = 1024
_MAX_FALSE_BOUNDARIES = 1000


@dataclass(slots=True)
class Part:
    """One complete part; a file that has neither name nor bytes is an empty file input."""

    name: str
    is_file: bool = False
    has_file_name: bool = False
    content: bytearray = field(default_factory=bytearray, repr=False)

    def text(self) -> str:
        """Decode a text.

        Raises:
            InvalidRequest: it is not UTF-8.
        """
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged("a text in it is not UTF-8") from None


async def read_parts(request: Request) -> list[Part]:
    """Read the parts in their order.

    Raises:
        InvalidRequest: the form cannot be read, or holds too much.
    """
    boundary = _boundary(request.headers.get("content-type", ""))
    reader = _Reader(boundary)
    try:
        async with aclosing(pieces(request)) as stream:
            async for piece in stream:
                reader.feed(bytes(piece))
        return reader.parts
    finally:
        reader.close()


def damaged(fault: str) -> InvalidRequest:
    """Make the error for a malformed form; a parser's own message may quote the body."""
    return InvalidRequest(f"The form cannot be read: {fault}.", code="invalid_multipart")


def _boundary(content_type: str) -> bytes:
    if len(content_type) > _MAX_TYPE_LENGTH:
        raise damaged(f"its content type has more than {_MAX_TYPE_LENGTH:,} characters")
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if boundary is None:
        raise damaged("its content type has no boundary")
    return boundary


class _Reader:
    """The callbacks of the parser; *parts* are those that are complete."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[Part] = []
        self._part = Part("")
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._texts_bytes = 0
        self._boundary = b"\r\n--" + boundary
        self._boundaries = 0
        callbacks: MultipartCallbacks = {
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise damaged("its boundary is too long") from None

    def feed(self, piece: bytes) -> None:
        """Parse the next bytes."""
        # Each false start of a boundary costs the parser microseconds.
        self._boundaries += piece.count(self._boundary)
        if self._boundaries > MAX_FILES + MAX_FIELDS + _MAX_FALSE_BOUNDARIES:
            raise damaged("it has too many parts")
        try:
            self._parser.write(piece)
        except FormParserError:
            raise damaged("it is damaged or cut short") from None
        # The parser reads padding byte by byte.
        if self._parser.state is MultipartState.BOUNDARY_PADDING and not piece.strip(b" \t"):
            raise damaged("it is damaged or cut short")

    def close(self) -> None:
        """Release everything at once.

        Reader and parser form a reference cycle, which else waits for the garbage collector.
        """
        self._parser.callbacks = {}
        self.parts = []
        self._part = Part("")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._disposition = b""
        name = options.get(b"name")
        if name is None:
            raise damaged("it is damaged or cut short")
        if len(name) > MAX_NAME_BYTES:
            raise damaged(f"a name in it has more than {MAX_NAME_BYTES:,} bytes")
        self._part = part = Part(
            name.decode("utf-8", "replace"),
            is_file=b"filename" in options,
            has_file_name=bool(options.get(b"filename")),
        )
        most, what = (MAX_FILES, "files") if part.is_file else (MAX_FIELDS, "fields")
        if sum(each.is_file == part.is_file for each in self.parts) == most:
            raise damaged(f"it has more than {most} {what}")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.content += data[start:end]
        if part.is_file:
            return
        self._texts_bytes += end - start
        if len(part.content) > MAX_TEXT_BYTES:
            raise damaged(f"a text has more than {MAX_TEXT_BYTES:,} bytes")
        if self._texts_bytes > MAX_TEXTS_BYTES:
            raise damaged(f"its texts have more than {MAX_TEXTS_BYTES:,} bytes together")

    def _on_part_end(self) -> None:
        self.parts.append(self._part)
