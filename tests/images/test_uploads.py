"""Reference images come out upright, opaque and in 8 bits, or are refused in fixed words."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from PIL import Image

from app.engine.models.registry import MODELS
from app.errors import InvalidRequest
from app.images import uploads
from app.images.uploads import decode_upload
from tests.images import ORIENTATION, picture, raw, saved


def test_a_reference_is_as_large_as_the_model_reads_it():
    """`images` knows no model: its two numbers are those of every architecture."""
    for entry in MODELS.values():
        assert entry.architecture.reference_pixels == uploads.REFERENCE_PIXELS
        assert entry.architecture.token_side == uploads.REFERENCE_MULTIPLE


class TestUpload:
    def test_png_jpeg_webp(self):
        """The three formats are read, whatever they are called."""
        image = picture("smooth").resize((96, 64))

        assert raw(image) == decode_upload(saved(image, "PNG"), what="image")
        for kind in ("JPEG", "WEBP"):
            decoded = decode_upload(saved(image, kind), what="image")
            assert (decoded.width, decoded.height) == (96, 64)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
    def test_every_mode_becomes_rgb(self, mode):
        """Grey, palettes, one bit and sixteen come out as the colours that they show."""
        image = Image.new("L", (64, 64), 255)
        image.paste(0, (0, 0, 32, 64))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)

        pixels = np.frombuffer(
            decode_upload(saved(image, "PNG"), what="image").pixels, np.uint8
        ).reshape(64, 64, 3)

        assert {0} == set(pixels[:, :32].flat)
        assert {255} == set(pixels[:, 32:].flat)

    def test_sixteen_bits_are_scaled(self):
        """A mid grey of 16 bits is a mid grey of 8, not white."""
        image = Image.fromarray(np.full((64, 64), 0x8000, np.uint16))

        assert {0x80} == set(decode_upload(saved(image, "PNG"), what="image").pixels)

    def test_cmyk(self):
        """A printer's JPEG is read too."""
        image = picture("smooth").resize((64, 64)).convert("CMYK")

        assert decode_upload(saved(image, "JPEG"), what="image").width == 64

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_transparency_turns_white(self, kind):
        """What is transparent becomes white, and half transparent red half white."""
        image = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
        image.paste((0, 0, 0, 0), (0, 0, 64, 32))

        decoded = decode_upload(saved(image, kind, lossless=True), what="image").pixels

        assert tuple(decoded[:3]) == (255, 255, 255)
        assert tuple(decoded[-3:]) == (255, 127, 127)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_orientation(self, kind):
        """A picture that a camera turned comes out upright."""
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        image = Image.new("RGB", (128, 64), "black")
        image.paste("white", (0, 0, 64, 64))

        decoded = decode_upload(saved(image, kind, exif=exif), what="image")

        assert (decoded.width, decoded.height) == (64, 128)
        assert decoded.pixels[0] > 200
        assert decoded.pixels[-1] < 50

    def test_first_frame_of_mpo(self):
        """Of a stereo photograph the first view is taken."""
        first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
        data = saved(first, "MPO", save_all=True, append_images=[second])

        assert decode_upload(data, what="image").pixels[0] > 200

    @pytest.mark.parametrize(
        ("image", "fine"),
        [((64, 64), True), ((64, 63), False), ((512, 64), True), ((513, 64), False)],
    )
    def test_shape(self, image, fine):
        """Sides from 64 pixels and ratios up to 8:1 are taken, others refused by name."""
        data = saved(Image.new("RGB", image), "PNG")
        if fine:
            assert image[0] == decode_upload(data, what="image").width
        else:
            self.refused(data, f"{image[0]}x{image[1]}")

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PDF", "EPS", "DDS", "JPEG2000"])
    def test_other_formats(self, kind):
        """Only PNG, JPEG and WebP reach a decoder."""
        self.refused(saved(Image.new("RGB", (64, 64)), kind), "none of PNG, JPEG, WEBP")

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_animated(self, kind):
        """An animation is refused."""
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        self.refused(saved(frames[0], kind, save_all=True, append_images=frames[1:]), "animated")

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_cut_short(self, kind):
        """A file that ends too soon is refused, wherever it ends."""
        data = saved(picture("smooth").resize((128, 128)), kind)
        for keep in (len(data) - 40, len(data) // 2, 40, 16, 12):
            self.refused(data[:keep], "damaged")

    @pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG", b"RIFF\0\0\0\0WAVE"])
    def test_not_an_image(self, data):
        """Text, nothing and other files are refused."""
        self.refused(data, "none of PNG, JPEG, WEBP")

    def test_mutations(self):
        """Of a thousand damaged files each is read or refused; no other error comes out."""
        chance = random.Random(0)
        image = picture("grainy").resize((64, 64))
        whole = [saved(image, kind) for kind in ("PNG", "JPEG", "WEBP")]
        for _ in range(1000):
            data = bytearray(chance.choice(whole))
            for _ in range(chance.randint(1, 12)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with contextlib.suppress(InvalidRequest):
                decoded = decode_upload(bytes(data), what="image")
                assert 3 * decoded.width * decoded.height == len(decoded.pixels)

    def test_limit_is_settable(self):
        """A caller may set a lower limit; it is named as it is."""
        data = saved(Image.new("RGB", (2000, 1000)), "PNG")
        with pytest.raises(InvalidRequest, match=r"more than 1\.5 million pixels"):
            decode_upload(data, what="image", max_pixels=1_500_000)

    def test_error_names_field_and_index(self):
        """The error names the field and which of the images it was."""
        with pytest.raises(InvalidRequest, match="image at index 3") as caught:
            decode_upload(b"GIF89a", what="images[3].image_url", index=3)

        assert (caught.value.param, caught.value.code) == ("images[3].image_url", "invalid_image")

    @staticmethod
    def refused(data: bytes, reason: str) -> None:
        with pytest.raises(InvalidRequest, match=reason) as caught:
            decode_upload(data, what="image")
        assert (caught.value.param, caught.value.code) == ("image", "invalid_image")
