"""Pictures that were made to do harm, or that are merely odd, made on the spot: nothing of this is
worth keeping in the repository.

`PICTURES` has a name and a maker for each. No decoder may crash, hang or fill the memory by one of
them: it becomes a reference, or is refused in words of our own.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

from PIL import Image

Maker = Callable[[], bytes]

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Write *image* as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Make a picture that no encoder makes small."""
    count = width * height * len(mode.replace("1", "L"))
    return Image.frombytes(mode, (width, height), random.Random(count).randbytes(count))


# PNG


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """Write one chunk of a PNG."""
    if checksum is None:
        checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """Write the first chunk of a PNG."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks: bytes, width: int = 64, height: int = 64, rows: bytes | None = None) -> bytes:
    """Write a PNG with *chunks* before its pixels."""
    data = bytes((1 + 3 * width) * height) if rows is None else rows
    body = chunk(b"IDAT", zlib.compress(data, 9))
    return SIGNATURE + header(width, height) + b"".join(chunks) + body + chunk(b"IEND", b"")


def deflated_zeros(size_bytes: int) -> bytes:
    """A zlib stream of so many zeros, made without making them."""
    part_bytes = 10_000_000
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = stream.compress(bytes(part_bytes)) + stream.flush(zlib.Z_FULL_FLUSH)
    parts = -(-size_bytes // part_bytes)
    adler = struct.pack(">HH", parts * part_bytes % 65_521, 1)
    return b"\x78\xda" + part * parts + b"\x03\x00" + adler


def png_bomb(width: int, height: int) -> bytes:
    """A valid PNG of black pixels, small as a file."""
    body = chunk(b"IDAT", deflated_zeros((1 + 3 * width) * height))
    return SIGNATURE + header(width, height) + body + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """A compressed text, or profile, of a gigabyte."""
    middle = b"\0\0\0\0\0" if kind == b"iTXt" else b"\0\0"
    if kind == b"iTXt":
        middle = b"\0\1\0\0\0"
    return png(chunk(kind, b"name" + middle + deflated_zeros(1_000_000_000)))


def interlaced(side: int) -> bytes:
    """Adam7 by hand, since Pillow does not write it; every pixel is black and transparent, every
    row is filtered by Paeth.
    """
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    stream = zlib.compressobj(1)
    rows = b""
    for left, top, across, down in (*passes, (0, 1, 1, 2)):
        row = b"\4" + bytes(-(-(side - left) // across) * 4)
        rows += stream.compress(row * -(-(side - top) // down))
    rows += stream.flush()
    start = SIGNATURE + header(side, side, colour=6, interlace=1)
    return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep(colour: int, channels: int) -> bytes:
    """Sixteen bits a channel."""
    row = b"\0" + random.Random(colour).randbytes(2 * channels * 64)
    body = chunk(b"IDAT", zlib.compress(row * 64))
    return SIGNATURE + header(64, 64, depth=16, colour=colour) + body + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    """Three frames."""
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def transparent_palette() -> bytes:
    """Every entry of the palette has an alpha of its own."""
    image = noise(64, 64, "L").convert("P")
    return saved(image, "PNG", transparency=bytes(range(256)))


# JPEG


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Split a JPEG into its markers with all that follows each."""
    at = 2
    while at < len(data) - 2:
        code = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if code == 0xDA:
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        yield code, data[at:end]
        at = end


def _progressive(image: Image.Image, **options: object) -> tuple[bytes, list[bytes]]:
    """A progressive JPEG up to its first scan, and each further one with its tables."""
    head, scans, tables = b"\xff\xd8", [], b""
    for code, part in segments(saved(image, "JPEG", progressive=True, quality=95, **options)):
        tables += part
        if code == 0xDA:
            scans.append(tables)
            tables = b""
    return head + scans[0], scans[1:]


def flat_jpeg(width: int, height: int) -> bytes:
    """A baseline JPEG of one grey, in full colour, made without making its pixels: each block of
    8x8 says the same 14 bits. Sides are multiples of 8, and their blocks of 4.
    """
    grey = saved(Image.new("RGB", (8, 8), (128, 128, 128)), "JPEG", subsampling=0)
    head = bytearray(grey[: grey.index(b"\xff\xda") + 14])
    at = head.index(b"\xff\xc0")
    head[at + 5 : at + 9] = struct.pack(">HH", height, width)
    four = int("00101000000000" * 4, 2).to_bytes(7, "big")
    return bytes(head) + four * (width * height // 256) + b"\xff\xd9"


@cache
def many_scans(width: int, height: int, repeats: int) -> bytes:
    """A progressive JPEG whose scans but the first are there again and again: each goes through
    all the blocks.
    """
    head, scans = _progressive(Image.new("L", (width, height), 90))
    return head + b"".join(scans) * repeats + b"\xff\xd9"


def hidden_scans(width: int, height: int, repeats: int, code: int = 0x01) -> bytes:
    """As `many_scans`, with a marker that has no length before each round: who takes the next bytes
    for one passes over 64 KB of scans.
    """
    head, scans = _progressive(Image.new("L", (width, height), 90))
    return head + (bytes([0xFF, code]) + b"".join(scans)) * repeats + b"\xff\xd9"


@cache
def slow_jpeg() -> bytes:
    """A megabyte within every limit on a picture's size and scans, which takes long to decode."""
    exif = Image.Exif()
    exif[0x0112] = 5  # turned, which is one more copy
    image = Image.new("CMYK", (5000, 5000), 90)
    head, scans = _progressive(image, subsampling=0, exif=exif)
    return head + b"".join(scans) * 5 + b"\xff\xd9"


def jpeg_of_scans(count: int) -> bytes:
    """A small progressive JPEG of so many scans."""
    head, scans = _progressive(noise(64, 64, "L"))
    more = scans[-1] * (count - 1 - len(scans))
    return head + b"".join(scans) + more + b"\xff\xd9"


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG that claims another size."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_with(*parts: bytes) -> bytes:
    """A sound JPEG with segments of ours at its start."""
    data = saved(noise(64, 64), "JPEG")
    return data[:2] + b"".join(parts) + data[2:]


def segment(code: int, body: bytes) -> bytes:
    """Write one segment of a JPEG."""
    return bytes([0xFF, code]) + (2 + len(body)).to_bytes(2, "big") + body


def looping_exif() -> bytes:
    """EXIF whose directories point at themselves."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    body = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 8)
    return jpeg_with(segment(0xE1, b"Exif\0\0" + body))


def stereo() -> bytes:
    """MPO, two views."""
    return saved(noise(64, 64), "MPO", save_all=True, append_images=[noise(64, 64)])


def ycck() -> bytes:
    """CMYK with Adobe's mark that says it is YCCK."""
    data = bytearray(saved(noise(64, 64, "CMYK"), "JPEG"))
    at = data.index(b"Adobe") + len("Adobe") + 6
    data[at] = 2
    return bytes(data)


# WebP


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A RIFF file of these chunks."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP that claims another size."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack("<I", data[at : at + 4])
    data[at : at + 4] = struct.pack("<I", bits >> 28 << 28 | (height - 1) << 14 | width - 1)
    return bytes(data)


def webp_lossless() -> bytes:
    """The coded part of a sound file."""
    return saved(noise(64, 64), "WEBP", lossless=True)[20:]


PICTURES: dict[str, Maker] = {
    "png of 169 million pixels": lambda: png_bomb(13_000, 13_000),
    "png of a small file and a million pixels": lambda: png_bomb(1000, 1000),
    "png of no width": lambda: png(width=0, rows=b""),
    "png of no height": lambda: png(height=0, rows=b""),
    "png of two billion columns": lambda: SIGNATURE + header(2**31 - 1, 64) + chunk(b"IEND", b""),
    "png with a zTXt of a gigabyte": lambda: text_bomb(b"zTXt"),
    "png with an iTXt of a gigabyte": lambda: text_bomb(b"iTXt"),
    "png with an iCCP of a gigabyte": lambda: text_bomb(b"iCCP"),
    "png with pixels of a gigabyte": lambda: (
        SIGNATURE
        + header(64, 64)
        + chunk(b"IDAT", deflated_zeros(1_000_000_000))
        + chunk(b"IEND", b"")
    ),
    "png with 20,000 empty chunks": lambda: png(chunk(b"tEXt", b"a\0") * 20_000),
    "png in 20,000 pieces": lambda: (
        SIGNATURE
        + header(64, 64)
        + b"".join(chunk(b"IDAT", bytes([byte])) for byte in zlib.compress(bytes(193 * 64), 0))
        + chunk(b"IDAT", b"") * 8_000
        + chunk(b"IEND", b"")
    ),
    "png with a wrong checksum": lambda: (
        SIGNATURE
        + header(64, 64)
        + chunk(b"IDAT", zlib.compress(bytes(193 * 64)), checksum=1)
        + chunk(b"IEND", b"")
    ),
    "png with a chunk of four gigabytes": lambda: png(b"\xff\xff\xff\xfftEXtabc"),
    "png without pixels": lambda: SIGNATURE + header(64, 64) + chunk(b"IEND", b""),
    "png with unknown filters": lambda: png(rows=(b"\x09" + bytes(192)) * 64),
    "png of an unknown colour type": lambda: SIGNATURE + header(64, 64, colour=5) + b"\0" * 40,
    "png, palette missing": lambda: SIGNATURE + header(64, 64, colour=3) + png()[33:],
    "png, interlaced": lambda: interlaced(100),
    "png, sixteen bits grey": lambda: deep(0, 1),
    "png, sixteen bits colour": lambda: deep(2, 3),
    "png, sixteen bits with alpha": lambda: deep(6, 4),
    "png, one bit": lambda: saved(Image.new("1", (64, 64)), "PNG"),
    "png, palette with transparency": transparent_palette,
    "png with EXIF of a megabyte": lambda: png(chunk(b"eXIf", b"II*\0" + b"\xff" * 1_000_000)),
    "png, cut short": lambda: saved(noise(64, 64), "PNG")[:2000],
    "png, its first bytes alone": lambda: SIGNATURE,
    "apng": lambda: animated("PNG"),
    "apng of four billion frames": lambda: png(chunk(b"acTL", b"\xff" * 8)),
    "jpeg of thousands of scans": lambda: many_scans(1000, 1000, 400),
    "jpeg of hidden scans": lambda: hidden_scans(1000, 1000, 400),
    "jpeg of a hundred scans": lambda: many_scans(1000, 1000, 19),
    "jpeg of 65500x65500": lambda: jpeg_of(65_500, 65_500),
    "jpeg of no width": lambda: jpeg_of(0, 64),
    "jpeg of no height": lambda: jpeg_of(64, 0),
    "jpeg that is mostly missing": lambda: jpeg_of(1500, 1500),
    "jpeg, cut short": lambda: saved(noise(64, 64), "JPEG")[:900],
    "jpeg, its first bytes alone": lambda: b"\xff\xd8\xff",
    "jpeg of fill bytes": lambda: b"\xff\xd8" + b"\xff" * 20_000,
    "jpeg of 20,000 segments": lambda: jpeg_with(segment(0xFE, b"") * 20_000),
    "jpeg with a segment of no length": lambda: jpeg_with(b"\xff\xe1\0\0"),
    "jpeg with 2 MB of EXIF": lambda: jpeg_with(
        segment(0xE1, b"Exif\0\0II*\0" + b"\x08" * 65_000) * 32
    ),
    "jpeg with EXIF that loops": looping_exif,
    "jpeg with ICC in 255 parts": lambda: jpeg_with(
        *(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + b"x" * 9000) for i in range(1, 256))
    ),
    "jpeg, CMYK": lambda: saved(noise(64, 64, "CMYK"), "JPEG"),
    "jpeg, YCCK": ycck,
    "jpeg, grey": lambda: saved(noise(64, 64, "L"), "JPEG"),
    "jpeg, two views": stereo,
    "jpeg, twelve bits": lambda: jpeg_with().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "jpeg, arithmetic": lambda: jpeg_with().replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11"),
    "webp of 16383x16383": lambda: webp_of(16_383, 16_383),
    "webp that is mostly missing": lambda: webp_of(4000, 4000),
    "webp, cut short": lambda: saved(noise(64, 64), "WEBP")[:900],
    "webp without chunks": lambda: webp(),
    "webp with an empty chunk": lambda: webp((b"VP8 ", b"")),
    "webp with unknown chunks": lambda: webp(
        *[(b"JUNK", b"abc")] * 10_000, (b"VP8L", webp_lossless())
    ),
    "webp with a canvas of its own": lambda: webp(
        (b"VP8X", b"\x10\0\0\0" + b"\xff\x3f\0" * 2), (b"VP8L", webp_lossless())
    ),
    "webp with 2 MB of EXIF": lambda: saved(noise(64, 64), "WEBP", exif=b"\x08" * 2_000_000),
    "webp, animated": lambda: animated("WEBP"),
    "webp, lossless": lambda: saved(noise(64, 64), "WEBP", lossless=True),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
}


def mutated(seed: int) -> bytes:
    """A sound file with some bytes changed."""
    chance = random.Random(seed)
    kind = chance.choice(("PNG", "JPEG", "WEBP"))
    data = bytearray(saved(noise(96, 64), kind))
    for _ in range(chance.randint(1, 20)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)
