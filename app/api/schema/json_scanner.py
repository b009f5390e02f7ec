"""An incremental JSON reader that can neither block the event loop nor fill the memory.

`json.loads` holds the GIL for as long as it runs, also in a thread: a body of 60 MB takes seconds,
and one of empty objects twenty times its size in memory. Bodies are large because of images in
base64, and those need no parsing. So the text is searched for quotes piece by piece, each long
string is cut out and kept as bytes, and only what is left, which is small and bounded in its number
of values, goes to `json.loads`. There each string that was cut out is a placeholder, which carries
a random number since a caller could write any fixed one.

A long string is still validated as JSON: UTF-8, escapes, no control characters.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, NoReturn

from app.errors import InvalidRequest, Kind, KleinError

MAX_PLAIN = 2_000_000
"""Characters of a JSON body besides its long strings; bytes of one that has no images."""
MAX_VALUES = 10_000
"""Strings, opening brackets and commas of a JSON body."""
LONG = 65_536
"""Characters, escapes unparsed, above which a string is cut out."""

# Without possessive quantifiers, which match too little before Python 3.11.5 (gh-106052).
_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*(")')
_PARTIAL = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_CONTROL = re.compile("[\0-\x1f]")
_LONGEST_ESCAPE = len(r"\u0000")
_NAME_BYTES = 400


@dataclass(slots=True, eq=False)
class LongText:
    """A long string of a body: its UTF-8 bytes, and its length in characters."""

    content: bytearray = field(default_factory=bytearray, repr=False)
    length: int = 0

    def extend(self, part: str) -> None:
        """Append the next characters as they stand in the body, in whole escapes."""
        if _CONTROL.search(part):
            raise _invalid()
        if "\\" in part:
            part = parse(f'"{part}"')
        self.length += len(part)
        self.content += part.encode("utf-8", "surrogatepass")

    def text(self) -> str:
        """Decode it; surrogate pairs that were split between pieces of the body are joined."""
        text = self.content.decode("utf-8", "surrogatepass")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def start(self) -> str:
        """Return its first characters, at least a hundred."""
        return bytes(self.content[:_NAME_BYTES]).decode("utf-8", "ignore")


class Scanner:
    """The reader of one body, in time linear in its bytes, whatever they are.

    Every method raises `InvalidRequest` or `KleinError` for invalid JSON, or too much of it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._nonce = secrets.token_hex(16)
        self._tail = ""
        """The start of an escape that the last piece did not hold whole."""
        self._kept: list[str] = []
        self._kept_length = 0
        self._values = 0
        self._is_in_string = False
        self._string = ""
        """What there is of the current string, unless it is long."""
        self._long: LongText | None = None
        self._longs: dict[str, LongText] = {}
        """By placeholder."""

    def feed(self, piece: bytes | memoryview) -> None:
        """Read the next bytes."""
        text = self._tail + self._decode(piece)
        self._tail = ""
        at = 0
        while at < len(text):
            at = self._read_string(text, at) if self._is_in_string else self._read_plain(text, at)

    def finish(self) -> Any:
        """Return the value of the whole body, with `LongText` for each long string."""
        self._decode(b"", is_last=True)
        if self._is_in_string:
            raise _invalid()
        value = parse("".join(self._kept))
        try:
            return self._put_back(value) if self._longs else value
        except RecursionError:
            raise _invalid() from None

    def _decode(self, piece: bytes | memoryview, *, is_last: bool = False) -> str:
        try:
            return self._decoder.decode(piece, is_last)
        except ValueError:
            raise _invalid() from None

    def _read_plain(self, text: str, at: int) -> int:
        """Read up to the next string, its opening quote included."""
        end = text.find('"', at) + 1
        self._is_in_string = end > 0
        part = text[at : end or len(text)]
        self._keep(part)
        self._values += sum(map(part.count, ',[{"'))
        if self._values > MAX_VALUES:
            raise InvalidRequest(
                f"The body holds more than {MAX_VALUES:,} values; send only the fields that there "
                "are.",
                code="invalid_json",
            )
        return at + len(part)

    def _read_string(self, text: str, at: int) -> int:
        """Read what *text* holds of the current string."""
        end = _end_of_string(text, at)
        self._string += text[at:end]
        if self._long is not None or len(self._string) > LONG:
            self._long = self._long or LongText()
            self._long.extend(self._string)
            self._string = ""
        if text[end : end + 1] == '"':
            self._end_string()
            return end + 1
        self._tail = text[end:]
        return len(text)

    def _end_string(self) -> None:
        if self._long is not None:
            self._string = f"{self._nonce}{len(self._longs)}"
            self._longs[self._string] = self._long
        self._keep(self._string + '"')
        self._is_in_string, self._string, self._long = False, "", None

    def _keep(self, part: str) -> None:
        self._kept_length += len(part)
        if self._kept_length > MAX_PLAIN:
            raise too_large(f"has more than {MAX_PLAIN:,} characters beside its pictures")
        self._kept.append(part)

    def _put_back(self, value: Any) -> Any:
        """Replace every placeholder by its string; in a key, by the string's start."""
        if isinstance(value, dict):
            return {
                self._longs[name].start() if name in self._longs else name: self._put_back(each)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [self._put_back(each) for each in value]
        return self._longs.get(value, value) if isinstance(value, str) else value


def parse(text: str) -> Any:
    """Parse a short text.

    Raises:
        InvalidRequest: it is not valid JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # overlong integers are ValueErrors too
        raise _invalid() from None


def too_large(fault: str) -> KleinError:
    """Make the error for a body that is too large."""
    return KleinError(f"The body {fault}; send less.", kind=Kind.TOO_LARGE)


def _end_of_string(text: str, at: int) -> int:
    """Find the closing quote, or else the end of the last complete character or escape."""
    quote = text.find('"', at)
    limit = len(text) if quote < 0 else quote
    escape = text.find("\\", at, limit)
    if escape < 0:
        return limit
    if quote >= 0 and (closing := _QUOTE.search(text, escape)):
        return closing.start(1)
    last = text.rfind("\\", max(escape, len(text) - _LONGEST_ESCAPE + 1))
    run = text[escape : last + 1]
    # Of an even run each backslash belongs to a pair.
    is_odd = (len(run) - len(run.rstrip("\\"))) % 2
    return last if is_odd and _PARTIAL.fullmatch(text, last) else len(text)


def _invalid() -> InvalidRequest:
    return InvalidRequest(
        "The body is not valid JSON; check quotes, commas and UTF-8.", code="invalid_json"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON
