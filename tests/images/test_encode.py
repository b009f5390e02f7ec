"""What leaves as a file has the very pixels, is valid, and says how it was made."""

from __future__ import annotations

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ExifTags, Image

from app.domain import RawImage
from app.images import OutputFormat, encode
from app.images.png import encode_png
from tests.images import noise, picture, raw, saved

PNG = OutputFormat("png")


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Walk the chunks of a PNG as a strict reader does: every length and every checksum counts."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + length
    assert at == len(data)
    return found


def png(image: RawImage, threads: int) -> bytes:
    """Encode on *threads*, the caller's among them."""
    if threads == 1:
        return encode_png(image, {})
    with ThreadPoolExecutor(threads - 1) as helpers:
        return encode_png(image, {}, helpers)


class TestPng:
    @pytest.mark.parametrize("threads", [1, 2, 8])
    @pytest.mark.parametrize(
        ("width", "height"),
        [(1, 1), (1, 7), (2, 300), (64, 64), (997, 131), (16, 4099), (4096, 65)],
    )
    def test_pixels_come_back(self, width, height, threads):
        """Whatever the size and the number of threads, a decoder returns the very same pixels."""
        image = noise(width, height)

        decoded = Image.open(io.BytesIO(png(image, threads)))
        decoded.load()

        assert ("RGB", (width, height)) == (decoded.mode, decoded.size)
        assert image.pixels == decoded.tobytes()

    @pytest.mark.parametrize("name", ["smooth", "grainy"])
    def test_small_enough(self, name):
        """A picture takes at most 1.2 times the bytes of Pillow's default."""
        image = picture(name)

        data = encode(raw(image), PNG)

        assert len(data) <= 1.2 * len(saved(image, "PNG"))
        assert image.tobytes() == Image.open(io.BytesIO(data)).tobytes()

    def test_flat_stays_small(self):
        """A drawing of flat areas takes kilobytes, not what noise of its size would."""
        canvas = np.full((1024, 1024, 3), 250, np.uint8)
        canvas[300:600, 300:700] = (220, 40, 40)

        assert len(encode(RawImage(1024, 1024, canvas.tobytes()), PNG)) < 16_000

    def test_strictly_valid(self):
        """Chunks stand in order with right checksums, and the zlib stream ends with its own."""
        image = raw(picture("grainy"))

        found = chunks(encode(image, PNG, {"prompt": "a cat"}))
        kinds = [kind for kind, _ in found]
        rows = zlib.decompress(b"".join(body for kind, body in found if kind == b"IDAT"))

        assert kinds[:3] == [b"IHDR", b"tEXt", b"IDAT"]
        assert kinds[-2:] == [b"IDAT", b"IEND"]
        assert {b"IDAT"} == set(kinds[2:-1])
        assert (1 + 3 * image.width) * image.height == len(rows)

    def test_the_number_of_threads_leaves_no_trace(self):
        """The same pixels give the same bytes on every machine."""
        image = noise(500, 700)

        assert png(image, 1) == png(image, 8)

    @pytest.mark.parametrize(
        ("prompt", "kept"),
        [
            ("a red circle", "a red circle"),
            ("", ""),
            ("ein Bär, 熊 and a 🐻", "ein Bär, 熊 and a 🐻"),
            ("first\r\nsecond\nthird\t", "first\r\nsecond\nthird\t"),
            ("a\0b", "a\ufffdb"),
            ("half a pair: \ud83d", "half a pair: ?"),
            ("x" * 32_000, "x" * 32_000),
            ("\x1b[31mtEXt\x89PNG", "\x1b[31mtEXt\x89PNG"),
        ],
    )
    def test_metadata_survives(self, prompt, kept):
        """Any prompt is kept, and what PNG cannot hold is replaced without breaking the file."""
        data = encode(noise(8, 8), PNG, {"prompt": prompt, "seed": "42"})

        chunks(data)
        decoded = Image.open(io.BytesIO(data))
        decoded.load()

        assert {"prompt": kept, "seed": "42"} == decoded.text

    def test_without_metadata(self):
        """No word is written where none was asked for."""
        assert Image.open(io.BytesIO(encode(noise(8, 8), PNG))).text == {}


class TestJpegAndWebp:
    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_format_and_size(self, kind):
        """The file is of the kind that was asked for, and says so."""
        output = OutputFormat(kind)
        decoded = Image.open(io.BytesIO(encode(raw(picture("smooth")), output)))

        assert (kind.upper(), (1024, 1024)) == (decoded.format, decoded.size)
        assert f"image/{kind}" == output.media_type

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_compression_is_quality(self, kind):
        """Less quality makes a smaller file, down to 0 and up to 100."""
        image = raw(picture("grainy"))
        sizes = [len(encode(image, OutputFormat(kind, quality))) for quality in (0, 20, 90, 100)]

        assert sorted(set(sizes)) == sizes

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    @pytest.mark.parametrize(
        ("prompt", "kept"),
        [
            ("a red circle", "a red circle"),
            ("ein 🐻\r\n<&>\x1b", "ein 🐻\r\n<&>\x1b"),
            ("half: \ud83d\0", "half: ?\ufffd"),
        ],
    )
    def test_metadata_survives(self, kind, prompt, kept):
        """AUTOMATIC1111's text is where it has it in such files, our JSON in XMP."""
        data = encode(noise(64, 64), OutputFormat(kind), notes(prompt))

        assert comment(data) == f"{kept}\n{SETTINGS}"
        assert recipe(data) == {"prompt": prompt, "seed": 42}

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    @pytest.mark.parametrize("letter", ["🐻", "x", "&", "\x01"])
    def test_a_long_prompt_is_cut(self, kind, letter):
        """One too long for a JPEG's segment, and marked; the settings stay whole."""
        data = encode(noise(64, 64), OutputFormat(kind), notes(letter * 32_000))
        text, told = comment(data), recipe(data)

        for prompt in (text.removesuffix(f"\n{SETTINGS}"), told["prompt"]):
            assert prompt.endswith(f"{letter}...") or prompt == "x" * 32_000
            assert 3_000 < len(prompt) <= 32_000
        assert text.endswith(f"{letter}...\n{SETTINGS}")
        assert told["seed"] == 42

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_without_metadata(self, kind):
        """No word is written where none was asked for, and the pixels are the same."""
        bare = Image.open(io.BytesIO(encode(noise(64, 64), OutputFormat(kind))))
        told = Image.open(io.BytesIO(encode(noise(64, 64), OutputFormat(kind), notes("a"))))

        assert not {"exif", "xmp"} & set(bare.info)
        assert bare.tobytes() == told.tobytes()


SETTINGS = "Steps: 4, Seed: 42"


def notes(prompt: str) -> dict[str, str]:
    """Metadata as the service writes it."""
    return {
        "parameters": f"{prompt}\n{SETTINGS}",
        "klein": json.dumps({"prompt": prompt, "seed": 42}),
    }


def comment(data: bytes) -> str:
    """Read EXIF's user comment as AUTOMATIC1111 does."""
    exif = Image.open(io.BytesIO(data)).getexif().get_ifd(ExifTags.IFD.Exif)
    code, text = exif[ExifTags.Base.UserComment][:8], exif[ExifTags.Base.UserComment][8:]
    assert code == b"UNICODE\0"
    return text.decode("utf-16-be")


def recipe(data: bytes) -> dict[str, object]:
    """Read our JSON from XMP."""
    packet = ElementTree.fromstring(Image.open(io.BytesIO(data)).info["xmp"])
    (text,) = packet.itertext()
    return json.loads(text)
