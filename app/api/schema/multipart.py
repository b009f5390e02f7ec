"""An incremental reader of `multipart/form-data`: texts and files in memory, always in UTF-8.

Starlette's own reader lets the client choose a codec, and some of Python's take minutes for a
megabyte; it keeps files in spooled temporary files, which are copied twice. This one has only what
a form with images needs, on the same parser. The parser is fed small pieces, so it blocks the event
loop for milliseconds at most.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from app.api.schema.body import pieces
from app.errors import InvalidRequest
from app.limits import MAX_PROMPT

MAX_FILES = 64
MAX_FIELDS = 64
MAX_TEXT_BYTES = 4 * MAX_PROMPT
"""Bytes of one text: of the longest prompt in UTF-8."""
MAX_TEXTS_BYTES = 4 * MAX_TEXT_BYTES
"""Bytes of all texts together; as Python strings they may be five times as large."""
MAX_NAME_BYTES = 1024
_MAX_TYPE_LENGTH = 1024
MAX_BOUNDARIES = MAX_FILES + MAX_FIELDS + 1000
"""Beginnings of boundaries, false ones too: each costs the parser microseconds."""


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


async def read_parts(request: Request, is_wanted: Callable[[str], bool]) -> list[Part]:
    """Read the parts in their order; one whose name *is_wanted* rejects is drained, never kept.

    Raises:
        InvalidRequest: the form cannot be read, is cut short, or holds too much.
    """
    form = _Form(is_wanted)
    parser = _make_parser(boundary_of(request), form)
    boundaries = 0
    async with aclosing(pieces(request)) as stream:
        async for piece in stream:
            boundaries += bytes(piece).count(parser.boundary)
            if boundaries > MAX_BOUNDARIES:
                raise damaged("it has too many parts")
            _feed(parser, bytes(piece))
    # Without its last parts a form would ask for something else: they may be the mask.
    if parser.state is not MultipartState.END:
        raise damaged("it is cut short, since its closing boundary is missing")
    return form.parts


def damaged(fault: str) -> InvalidRequest:
    """Make the error for a malformed form; a parser's own message may quote the body."""
    return InvalidRequest(f"The form cannot be read: {fault}.", code="invalid_multipart")


def boundary_of(request: Request) -> bytes:
    """Return the boundary of the form's parts, which its content type names.

    Raises:
        InvalidRequest: it names none.
    """
    content_type = request.headers.get("content-type", "")
    if len(content_type) > _MAX_TYPE_LENGTH:
        raise damaged(f"its content type has more than {_MAX_TYPE_LENGTH:,} characters")
    boundary: bytes | None = parse_options_header(content_type)[1].get(b"boundary")
    if boundary is None:
        raise damaged("its content type has no boundary")
    return boundary


def _make_parser(boundary: bytes, form: _Form) -> MultipartParser:
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_data": form.add_data,
                "on_part_end": form.end_part,
                "on_header_field": form.add_header_name,
                "on_header_value": form.add_header_value,
                "on_header_end": form.end_header,
                "on_headers_finished": form.begin_part,
            },
        )
    except FormParserError:
        raise damaged("its boundary is too long") from None


def _feed(parser: MultipartParser, piece: bytes) -> None:
    try:
        parser.write(piece)
    except FormParserError:
        raise damaged("it is damaged or cut short") from None
    # The parser reads padding byte by byte.
    if parser.state is MultipartState.BOUNDARY_PADDING and not piece.strip(b" \t"):
        raise damaged("it is damaged or cut short")


class _Form:
    """What the parser has read; *parts* are those that are complete.

    It does not know its parser: a reference cycle would wait for the garbage collector.
    """

    def __init__(self, is_wanted: Callable[[str], bool]) -> None:
        self.parts: list[Part] = []
        self._is_wanted = is_wanted
        self._part: Part | None = None
        """None while one is drained."""
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._texts_bytes = 0

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        """Append to the current header's name."""
        self._header += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        """Append to the current header's value."""
        self._value += data[start:end]

    def end_header(self) -> None:
        """Keep the header, if it is the one that names the part."""
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def begin_part(self) -> None:
        """Begin the part that the headers have named."""
        options = parse_options_header(self._disposition)[1]
        self._disposition = b""
        name = options.get(b"name")
        if name is None:
            raise damaged("it is damaged or cut short")
        if len(name) > MAX_NAME_BYTES:
            raise damaged(f"a name in it has more than {MAX_NAME_BYTES:,} bytes")
        part = Part(
            name.decode("utf-8", "replace"),
            is_file=b"filename" in options,
            has_file_name=bool(options.get(b"filename")),
        )
        self._part = part if self._is_wanted(part.name) else None
        most, what = (MAX_FILES, "files") if part.is_file else (MAX_FIELDS, "fields")
        if sum(each.is_file == part.is_file for each in self.parts) == most:
            raise damaged(f"it has more than {most} {what}")

    def add_data(self, data: bytes, start: int, end: int) -> None:
        """Append to the current part, within the limits of texts."""
        part = self._part
        if part is None:
            return
        part.content += data[start:end]
        if part.is_file:
            return
        self._texts_bytes += end - start
        if len(part.content) > MAX_TEXT_BYTES:
            raise damaged(f"a text has more than {MAX_TEXT_BYTES:,} bytes")
        if self._texts_bytes > MAX_TEXTS_BYTES:
            raise damaged(f"its texts have more than {MAX_TEXTS_BYTES:,} bytes together")

    def end_part(self) -> None:
        """Add the current part to those that are complete."""
        if self._part is not None:
            self.parts.append(self._part)
