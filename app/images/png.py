"""A PNG encoder for pictures that a model has made. It knows pixels and texts, no file, no HTTP.

A picture of 1024x1024 that took a quarter of a second to make should not wait as long again for its
file, which is what Pillow asks for. The time is gained three times over:

- one filter, Average, in a few numpy operations on bytes. On photograph-like pictures it leaves
  less than Sub, Up and Paeth do, so searching for the best filter of each row buys nothing;
- deflate by ISA-L, which looks for repetitions in a single place for each byte. What the filter
  leaves is noise around zero, in which there are nearly none to be found. Strips that are flat for
  the most part get zlib's run lengths, which leave less of them;
- strips of rows on threads. numpy and ISA-L let go of the interpreter lock, and a raw deflate
  stream that ends in a sync flush may be followed by another, so strips are joined by laying them
  end to end.

Left out: palettes, grey, interlacing, and the search that would make drawings with large flat areas
as small as they could be. `benchmarks/png.py` measures time and size beside Pillow.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from app.domain import RawImage

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_HEADER = b"\x78\x01"
_AVERAGE = 3
_RGB = 2
_LEVEL = 1
"""Of ISA-L's 0 to 3: the fastest whose Huffman codes are made for the bytes at hand."""
_STRIP_BYTES = 384 * 1024
"""A megapixel is eight strips, whoever works on them, so that a picture's file is always the same.
More and smaller ones take longer: threads wait for one another at the interpreter's lock."""
_FLAT_RATIO = 0.75
"""Share of zeros after filtering from which run lengths make a strip smaller, found by trial."""
_ADLER_MODULUS = 65_521

Rows = NDArray[np.uint8]


def encode_png(
    image: RawImage, metadata: Mapping[str, str], helpers: Executor | None = None
) -> bytes:
    """Turn pixels into a PNG file with one text chunk for each entry of *metadata*.

    The threads of *helpers*, of which none may wait for this one, take a part of the work.
    """
    rows = np.frombuffer(image.pixels, np.uint8).reshape(image.height, 3 * image.width)
    strips = _deflate(rows, helpers)
    adler = 1
    for strip in strips:
        adler = _join_adler(adler, strip.adler, strip.size_bytes)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _RGB, 0, 0, 0)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            *(_text_chunk(key, text) for key, text in metadata.items()),
            _chunk(b"IDAT", _ZLIB_HEADER),
            *(strip.chunk for strip in strips),
            _chunk(b"IDAT", adler.to_bytes(4, "big")),
            _chunk(b"IEND", b""),
        )
    )


@dataclass(frozen=True, slots=True)
class _Strip:
    """Some rows as a chunk of the file; *adler* and *size_bytes* are those of the filtered rows."""

    chunk: bytes
    adler: int
    size_bytes: int


def _deflate(rows: Rows, helpers: Executor | None) -> list[_Strip]:
    height, row_bytes = rows.shape
    step = max(1, _STRIP_BYTES // row_bytes)
    tops = range(0, height, step)

    strips: dict[int, _Strip] = {}
    waiting = iter(tops)

    def work() -> None:
        # next() on a range is a single step for the interpreter, so no two threads get the same.
        for top in waiting:
            strips[top] = _deflate_strip(rows, top, min(top + step, height))

    others = [helpers.submit(work) for _ in tops[1:]] if helpers is not None else []
    work()
    for other in others:
        # One that has not begun by now would find nothing to do.
        if not other.cancel():
            other.result()
    return [strips[top] for top in tops]


def _deflate_strip(rows: Rows, top: int, bottom: int) -> _Strip:
    filtered = _filter(rows, top, bottom)
    is_flat = 1 - np.count_nonzero(filtered) / filtered.size > _FLAT_RATIO
    stream = (
        zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
        if is_flat
        else isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    )
    body = stream.compress(filtered.data)
    # The two libraries number the ways of flushing alike.
    body += stream.flush(zlib.Z_FINISH if bottom == len(rows) else zlib.Z_SYNC_FLUSH)
    return _Strip(_chunk(b"IDAT", body), isal_zlib.adler32(filtered.data), filtered.size)


def _filter(rows: Rows, top: int, bottom: int) -> Rows:
    """Predict each byte by the mean, rounded down, of the pixel to its left and the one above."""
    current = rows[top:bottom]
    if top:
        above = rows[top - 1 : bottom - 1]
    else:
        above = np.zeros_like(current)
        above[1:] = current[:-1]
    left, up = current[:, :-3], above[:, 3:]
    # (left + up) >> 1 without ever leaving 8 bits.
    mean = left ^ up
    mean >>= 1
    mean += left & up
    filtered = np.empty((bottom - top, 1 + current.shape[1]), np.uint8)
    filtered[:, 0] = _AVERAGE
    np.subtract(current[:, :3], above[:, :3] >> 1, out=filtered[:, 1:4])
    np.subtract(current[:, 3:], mean, out=filtered[:, 4:])
    return filtered


def _join_adler(first: int, second: int, second_bytes: int) -> int:
    """Compute the Adler-32 of two byte strings laid end to end from that of each."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_bytes * ((first & 0xFFFF) - 1)
    return (high % _ADLER_MODULUS) << 16 | low % _ADLER_MODULUS


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return b"".join((len(body).to_bytes(4, "big"), kind, body, checksum.to_bytes(4, "big")))


def _text_chunk(key: str, text: str) -> bytes:
    """Write ASCII as tEXt and all else as iTXt; NUL, which neither can hold, becomes U+FFFD."""
    text = text.replace("\0", "\ufffd")
    if text.isascii():
        return _chunk(b"tEXt", key.encode("latin-1") + b"\0" + text.encode("ascii"))
    # JSON may bring half a surrogate pair, which UTF-8 cannot hold: the replacement is "?".
    body = text.encode("utf-8", "replace")
    # Key, not compressed, by no method, in no language, no translated key.
    return _chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + body)
