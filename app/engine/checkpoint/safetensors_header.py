"""The head of a safetensors file: how long, how deep and how large its numbers may be.

    8 bytes: length | that many bytes of JSON | the tensors' bytes

The length is judged before anything is read and the text before it becomes objects, since a file
may come from anyone: real heads are smaller than a megabyte. What passes is plain: names once each,
ranges inside the file that do not overlap, shapes of a size that can be. No torch here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

LENGTH_BYTES = 8
MAX_BYTES = 16_000_000
"""The longest head that is read."""
MAX_DEPTH = 8
"""A head is three deep: names, a tensor's entry, its shape."""

_MAX_SIDES = 16
_MAX_ELEMENTS = 1 << 62
_MAX_TOKENS = 2_000_000
"""Texts and brackets together; a tensor has eleven, and each may become an object of 50 bytes."""
# A text that does not end is taken whole too: tried from each quote in it, it would take hours.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class HeaderError(ValueError):
    """The head is none, in words that complete "the file is not whole: ..."."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the format's name of its type, its shape, and its bytes from *start* of the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def read_header(file: BinaryIO, total_bytes: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the head of *file*, which is *total_bytes* long; return tensors and notes by name.

    Raises:
        HeaderError: it is none.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > total_bytes - LENGTH_BYTES:
        raise HeaderError("its header is longer than the file")
    if length > MAX_BYTES:
        raise HeaderError(f"its header has {length:,} bytes, the most is {MAX_BYTES:,}")
    header = _parse(file.read(length))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(each, str) for each in notes.values()):
        raise HeaderError("the notes in its header are no texts")
    base = LENGTH_BYTES + length
    entries = {name: _entry(name, found, base, total_bytes) for name, found in header.items()}
    _refuse_overlaps(entries)
    return entries, notes


def parse_json(text: bytes | str) -> Any:
    """Parse JSON of a file that anyone may have made: no deeper than `MAX_DEPTH`, names once.

    Raises:
        HeaderError: it is none.
    """
    raw = text.encode() if isinstance(text, str) else text
    _check_tokens(raw)
    try:
        return json.loads(raw, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, HeaderError):
            raise
        raise HeaderError("its header cannot be read") from None


def _parse(raw: bytes) -> dict[str, Any]:
    header = parse_json(raw)
    if not isinstance(header, dict):
        raise HeaderError("its header cannot be read")
    return header


def _check_tokens(raw: bytes) -> None:
    """Refuse too many, and brackets that are nested too deeply; those in texts are no brackets."""
    depth = 0
    for number, token in enumerate(_TOKEN.finditer(raw)):
        sign = raw[token.start()]
        if sign in b"[{":
            depth += 1
        elif sign in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise HeaderError("its header is nested too deeply")
        if number >= _MAX_TOKENS:
            raise HeaderError("its header describes too many things")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HeaderError("its header has a name twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise HeaderError(f"its header holds the number {name}")


def _entry(name: str, found: Any, base: int, total_bytes: int) -> TensorEntry:
    """Check one tensor's numbers; its size is compared with its shape by who knows the types."""
    odd = HeaderError("its header describes a tensor in an impossible way")
    if not isinstance(found, dict) or not isinstance(found.get("dtype"), str):
        raise odd
    shape, offsets = _counts(found.get("shape")), _counts(found.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > _MAX_SIDES:
        raise odd
    if math.prod(max(1, side) for side in shape) > _MAX_ELEMENTS:
        raise odd
    start, end = offsets
    if start > end:
        raise odd
    if base + end > total_bytes:
        raise HeaderError("it ends before its last tensor")
    return TensorEntry(found["dtype"], tuple(shape), base + start, end - start)


def _counts(values: Any) -> list[int] | None:
    """Give *values* back where they are whole numbers of 0 and more; True and 1.0 are none."""
    if not isinstance(values, list):
        return None
    are_counts = all(type(value) is int and 0 <= value <= _MAX_ELEMENTS for value in values)
    return values if are_counts else None


def _refuse_overlaps(entries: Mapping[str, TensorEntry]) -> None:
    end = 0
    for start, size in sorted((each.start, each.size_bytes) for each in entries.values()):
        if size and start < end:
            raise HeaderError("two of its tensors share bytes")
        end = max(end, start + size)
