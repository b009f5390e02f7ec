"""Parses and validates the header of a safetensors file.

    8 bytes: length, little-endian | that many bytes of JSON | the tensors' bytes

The format: https://huggingface.co/docs/safetensors. Files are untrusted, so the length is checked
before the header is read, and the text before it is parsed; real headers are smaller than a
megabyte. A valid header has unique names, byte ranges inside the file that do not overlap, and
shapes of a possible size. No torch here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

LENGTH_BYTES = 8
MAX_BYTES = 16_000_000
"""The longest header that is read."""
MAX_DEPTH = 8
"""The deepest nesting; a valid header has three levels: names, a tensor's entry, its shape."""

_MAX_SIDES = 16
_MAX_ELEMENTS = 1 << 62
_MAX_TOKENS = 2_000_000
"""The most strings and brackets; a tensor has eleven, and each may become a 50-byte object."""
# An unterminated string is one token too: retried from each quote in it, it would take hours.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class HeaderError(Exception):
    """The header is invalid; the message completes "the file is not whole: ..."."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the format's name of its dtype, its shape, and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def read_header(file: BinaryIO, total_bytes: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read the header of *file*, which is *total_bytes* long; return tensors and metadata by name.

    Raises:
        HeaderError: it is invalid.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > total_bytes - LENGTH_BYTES:
        raise HeaderError("its header is longer than the file")
    if length > MAX_BYTES:
        raise HeaderError(f"its header has {length:,} bytes, the most is {MAX_BYTES:,}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise HeaderError("its header cannot be read")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(each, str) for each in notes.values()):
        raise HeaderError("the notes in its header are no texts")
    base = LENGTH_BYTES + length
    entries = {name: _entry(name, found, base, total_bytes) for name, found in header.items()}
    _refuse_overlaps(entries)
    return entries, notes


def parse_json(text: bytes | str) -> Any:
    """Parse untrusted JSON, no deeper than `MAX_DEPTH` and with unique names.

    Raises:
        HeaderError: it is invalid.
    """
    raw = text.encode() if isinstance(text, str) else text
    _check_tokens(raw)
    try:
        return json.loads(raw, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise HeaderError("its header cannot be read") from None


def _check_tokens(raw: bytes) -> None:
    """Check the number of tokens and the nesting of brackets; brackets in strings do not count."""
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
    """Check one tensor's numbers; `safetensors_io` compares its size with its shape and dtype."""
    entry = found if isinstance(found, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not _are_counts(shape)
        or not _are_counts(offsets)
        or len(offsets) != 2
        or len(shape) > _MAX_SIDES
        or math.prod(max(1, side) for side in shape) > _MAX_ELEMENTS
        or offsets[0] > offsets[1]
    ):
        raise HeaderError("its header describes a tensor in an impossible way")
    start, end = offsets
    if base + end > total_bytes:
        raise HeaderError("it ends before its last tensor")
    return TensorEntry(dtype, tuple(shape), base + start, end - start)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    """Return whether *values* are non-negative ints, not bools or floats."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_ELEMENTS for value in values
    )


def _refuse_overlaps(entries: Mapping[str, TensorEntry]) -> None:
    end = 0
    for start, size in sorted((each.start, each.size_bytes) for each in entries.values()):
        if size and start < end:
            raise HeaderError("two of its tensors share bytes")
        end = max(end, start + size)
