"""Small files that claim to be huge are refused before they cost anything."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from tests.images import saved

BOMB_PROBE = """
import resource, sys
from PIL import ImageFile
from app.errors import InvalidRequest
from app.images.uploads import decode_mask, decode_upload
data = sys.stdin.buffer.read()
def load(self):
    raise SystemExit("it was decoded")
ImageFile.ImageFile.load = load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for judge in (lambda: decode_upload(data, what="image"), lambda: decode_mask(data, 64, 64)):
    try:
        judge()
    except InvalidRequest as error:
        known = ("25 million", "64 million", "none of PNG")
        assert any(words in error.message for words in known), error.message
    else:
        raise SystemExit("it was taken")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def png_bomb() -> bytes:
    """A valid PNG of 13000x13000 black pixels in half a megabyte, made without making them."""
    side, steps = 13_000, 130
    size_bytes = (1 + 3 * side) * side
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = stream.compress(bytes(size_bytes // steps)) + stream.flush(zlib.Z_FULL_FLUSH)
    adler = struct.pack(">HH", size_bytes % 65521, 1)
    body = b"\x78\xda" + part * steps + b"\x03\x00" + adler
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def jpeg_bomb() -> bytes:
    """The start of a JPEG that claims 65500x65500 pixels."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def webp_bomb() -> bytes:
    """A lossless WebP that claims 16383x16383 pixels."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack("<I", data[at : at + 4])
    data[at : at + 4] = struct.pack("<I", bits >> 28 << 28 | 16_382 << 14 | 16_382)
    return bytes(data)


class TestBombs:
    @pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb, webp_bomb])
    def test_refused_before_decoding(self, bomb):
        """A small file with 169 million pixels or more costs no memory: none of it is decoded."""
        data = bomb()
        assert len(data) < 1_000_000

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", BOMB_PROBE],
            input=data,
            capture_output=True,
            check=False,
        )

        assert done.stderr == b""
        assert int(done.stdout) < 50_000  # kilobytes
