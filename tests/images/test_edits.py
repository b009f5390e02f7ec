"""Masks mean one thing only, and references reach the model as diffusers would hand them over."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from app.domain import Mask
from app.errors import InvalidRequest
from app.images.uploads import decode_mask, decode_painted_mask, prepare_reference, resize
from tests.images import ORIENTATION, noise, picture, raw, saved


def half_white() -> Image.Image:
    """White on the left, black on the right."""
    painted = Image.new("L", (64, 64))
    painted.paste(255, (0, 0, 32, 64))
    return painted


def sixteen_bits() -> Image.Image:
    """The same with 16 bits."""
    painted = Image.new("I;16", (64, 64))
    painted.paste(65535, (0, 0, 32, 64))
    return painted


def black_and_white(data: bytes) -> tuple[Mask, bool]:
    """Decode as `KLEIN_MASK=auto` does."""
    return decode_mask(data, 64, 64, takes_black_and_white=True)


class TestMask:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_transparent_is_repainted(self, kind):
        """Transparent weighs 255, opaque 0, and what lies between its share."""
        alpha = Image.new("L", (64, 64), 255)
        alpha.paste(0, (0, 0, 32, 64))
        alpha.putpixel((63, 63), 55)
        image = Image.new("RGB", (64, 64), "green")
        image.putalpha(alpha)

        mask, _ = decode_mask(saved(image, kind, lossless=True), 64, 64)

        assert (mask.width, mask.height) == (64, 64)
        assert bytes([255] * 32 + [0] * 32) == mask.weights[:64]
        assert mask.weights[-1] == 200

    def test_wholly_transparent(self):
        """A mask that is transparent everywhere repaints everything."""
        mask, _ = decode_mask(saved(Image.new("RGBA", (64, 64)), "PNG"), 64, 64)

        assert {255} == set(mask.weights)

    def test_transparent_palette_entry(self):
        """A palette with a transparent colour has alpha as well."""
        image = Image.new("P", (64, 64))
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.paste(1, (0, 0, 64, 32))

        weights = decode_mask(saved(image, "PNG", transparency=1), 64, 64)[0].weights

        assert (weights[0], weights[-1]) == (255, 0)

    @pytest.mark.parametrize(
        ("mode", "kind", "options"),
        [
            ("1", "PNG", {}),
            ("L", "PNG", {}),
            ("P", "PNG", {}),
            ("RGB", "PNG", {}),
            ("RGBA", "PNG", {}),
            ("I;16", "PNG", {}),
            ("RGB", "WEBP", {"quality": 80}),
        ],
    )
    def test_of_a_black_and_white_one_white_is_repainted(self, mode, kind, options):
        """Without transparency, in any mode; almost white is white, almost black black."""
        painted = half_white().convert(mode) if mode != "I;16" else sixteen_bits()
        mask, is_painted = black_and_white(saved(painted, kind, **options))

        assert is_painted
        assert mask.weights[:64] == bytes([255] * 32 + [0] * 32)

    def test_its_smooth_edge_repaints_in_part(self):
        """What lies between black and white weighs its luma."""
        painted = half_white()
        for x, luma in ((0, 246), (1, 247), (2, 9), (3, 8)):
            painted.putpixel((x, 0), luma)

        assert list(black_and_white(saved(painted, "PNG"))[0].weights[:4]) == [246, 255, 9, 0]

    @pytest.mark.parametrize(("columns", "is_taken"), [(3, True), (4, False)])
    def test_one_pixel_in_twenty_may_lie_between(self, columns, is_taken):
        """Of 64 columns, three; more is a photograph."""
        painted = half_white()
        painted.paste(128, (0, 0, columns, 64))
        if is_taken:
            assert black_and_white(saved(painted, "PNG"))[1]
            return
        with pytest.raises(InvalidRequest, match="nor only black and white") as caught:
            black_and_white(saved(painted, "PNG"))

        assert (caught.value.param, caught.value.code) == ("mask", "invalid_mask")

    def test_transparency_wins_over_colours(self):
        """A mask with a transparent pixel is read by alpha alone."""
        image = half_white().convert("RGBA")
        image.paste((0, 0, 0, 0), (32, 0, 64, 64))
        mask, is_painted = black_and_white(saved(image, "PNG"))

        assert not is_painted
        assert mask.weights[:64] == bytes([0] * 32 + [255] * 32)

    @pytest.mark.parametrize(
        ("image", "reason"),
        [
            (Image.new("L", (64, 64)), "repaints nothing"),
            (Image.new("RGBA", (64, 64), "black"), "repaints nothing"),
            (Image.new("RGBA", (64, 64), (255, 255, 255, 128)), "no transparent pixel"),
            (Image.new("L", (64, 65), 255), "is 64x65 and the first image 64x64"),
        ],
    )
    def test_a_black_and_white_one_that_says_nothing_is_refused(self, image, reason):
        """Black throughout, half transparent throughout, of another size."""
        with pytest.raises(InvalidRequest, match=reason) as caught:
            black_and_white(saved(image, "PNG"))

        assert (caught.value.param, caught.value.code) == ("mask", "invalid_mask")

    @pytest.mark.parametrize("is_inverted", [False, True])
    def test_a_painted_one_repaints_white(self, is_inverted):
        """In any mode and format, greys in their share; inverted, the rest."""
        painted = Image.new("L", (64, 64))
        painted.paste(255, (0, 0, 32, 64))
        painted.paste(100, (32, 0, 48, 64))
        expected = [255] * 32 + [100] * 16 + [0] * 16
        if is_inverted:
            expected = [255 - each for each in expected]
        for mode, kind in (("L", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")):
            data = saved(
                painted.convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {})
            )
            mask = decode_painted_mask(data, 64, 64, is_inverted=is_inverted)

            assert list(mask.weights[:64]) == expected

    def test_of_a_painted_one_with_transparency_the_opaque_is_repainted(self):
        """As AUTOMATIC1111 reads a brush's layer, whatever its colour."""
        layer = Image.new("RGBA", (64, 64))
        layer.paste((0, 0, 0, 255), (0, 0, 32, 64))
        mask = decode_painted_mask(saved(layer, "PNG"), 64, 64, is_inverted=False)

        assert mask.weights[:64] == bytes([255] * 32 + [0] * 32)

    def test_a_painted_one_is_scaled(self):
        """AUTOMATIC1111's clients send it in the result's size."""
        painted = Image.new("L", (32, 16))
        painted.paste(255, (0, 0, 16, 16))
        mask = decode_painted_mask(saved(painted, "PNG"), 128, 64, is_inverted=False)

        assert (mask.width, mask.height) == (128, 64)
        assert (mask.weights[0], mask.weights[127]) == (255, 0)

    @pytest.mark.parametrize(("color", "is_inverted"), [("black", False), ("white", True)])
    def test_a_painted_one_that_repaints_nothing_is_refused(self, color, is_inverted):
        """The result would be the picture itself."""
        data = saved(Image.new("L", (64, 64), color), "PNG")
        with pytest.raises(InvalidRequest, match="repaints nothing") as caught:
            decode_painted_mask(data, 64, 64, is_inverted=is_inverted)

        assert (caught.value.param, caught.value.code) == ("mask", "invalid_mask")

    def test_orientation(self):
        """A mask that was turned together with its photograph is turned back."""
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        data = saved(Image.new("RGBA", (128, 64)), "PNG", exif=exif)

        assert decode_mask(data, 64, 128)[0].width == 64

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (saved(Image.new("RGB", (64, 64)), "PNG"), "no alpha channel"),
            (saved(Image.new("L", (64, 64)), "PNG"), "no alpha channel"),
            (saved(Image.new("RGB", (64, 64)), "JPEG"), "none of PNG, WEBP"),
            (saved(Image.new("RGBA", (64, 64), "black"), "PNG"), "no transparent pixel"),
            (saved(Image.new("RGBA", (64, 65)), "PNG"), "is 64x65 and the first image 64x64"),
            (saved(Image.new("RGBA", (64, 64)), "PNG")[:-30], "damaged"),
            (b"", "none of PNG, WEBP"),
        ],
    )
    def test_refused(self, data, reason):
        """A mask that could mean two things, or nothing, is refused with the way out."""
        with pytest.raises(InvalidRequest, match=reason) as caught:
            decode_mask(data, 64, 64)

        assert (caught.value.param, caught.value.code) == ("mask", "invalid_mask")


class TestReference:
    def test_small_is_only_cut(self):
        """Up to one megapixel nothing is scaled: the middle is cut to multiples of 16."""
        image = picture("smooth").resize((100, 70))

        assert raw(image.crop((2, 3, 98, 67))) == prepare_reference(raw(image))

    @pytest.mark.torch
    @pytest.mark.parametrize(
        "size", [(1024, 1024), (1025, 1024), (1920, 1080), (777, 2111), (64, 100), (2048, 256)]
    )
    def test_equals_diffusers(self, size):
        """What the model reads is, to the pixel, what diffusers' own pipeline would give it."""
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        image = picture("grainy").resize(size)
        processor = Flux2ImageProcessor(vae_scale_factor=16)
        processor.check_image_input(image)
        expected = processor._resize_if_exceeds_area(image, 1024 * 1024)
        width, height = expected.width // 16 * 16, expected.height // 16 * 16
        tensor = processor.preprocess(expected, height=height, width=width, resize_mode="crop")

        prepared = prepare_reference(raw(image))

        pixels = ((tensor[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        assert (width, height) == (prepared.width, prepared.height)
        assert pixels.tobytes() == prepared.pixels

    def test_resize(self):
        """A picture takes the size that it is given."""
        scaled = resize(noise(64, 64), 32, 48)

        assert (scaled.width, scaled.height, len(scaled.pixels)) == (32, 48, 32 * 48 * 3)
