"""Photographs above 25 million pixels: a baseline JPEG is read at half its size, or refused.

Where the size itself does not matter, the limit is lowered instead, and the pictures are small.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from app.errors import InvalidRequest
from app.images.decoder import Limits
from app.images.pool import DecoderPool
from app.images.preparing import WHITE, Upload, prepare
from app.images.uploads import MAX_JPEG_PIXELS, MAX_PIXELS, decode_original, decode_upload
from tests.data.hostile import flat_jpeg, png_bomb, webp_of
from tests.images import ORIENTATION, picture, saved

LARGE = 5632, 4480
"""A little above 25 million pixels."""


def pixels(image) -> np.ndarray:
    """Height x width x 3."""
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def nearest(width: int, height: int) -> tuple[int, int]:
    """Take every size."""
    return width, height


def refusal(*pictures: bytes, mask: bytes | None = None, size=None) -> str:
    """The words with which they are refused."""
    uploads = [Upload(data, "image") for data in pictures]
    over = None if mask is None else Upload(mask, "mask")
    with pytest.raises(InvalidRequest) as caught:
        prepare(uploads, over, size, nearest)
    assert caught.value.code == ("invalid_image" if mask is None else "invalid_mask")
    return caught.value.message


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})],
    ids=str,
)
def test_colours_stay(mode, options):
    """Those of the picture that was decoded whole, at half its sides."""
    image = picture("smooth").resize((160, 96)).convert(mode)
    data = saved(image, "JPEG", quality=95, **options)
    halved = decode_original(data, what="image", max_pixels=10_000)
    whole = decode_upload(data, what="image")

    assert (halved.width, halved.height) == (160, 96)
    assert (halved.image.width, halved.image.height) == (80, 48)
    scaled = Image.fromarray(pixels(whole)).resize((80, 48), Image.Resampling.BOX)
    difference = np.abs(pixels(halved.image).astype(int) - np.asarray(scaled))
    assert difference.mean() < 3


@pytest.mark.parametrize(("orientation", "is_turned"), [(1, False), (3, False), (6, True)])
def test_orientation_stays(orientation, is_turned):
    """Upright, and so is the size that a mask must have."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.new("RGB", (256, 128), "black")
    image.paste("white", (0, 0, 128, 128))
    data = saved(image, "JPEG", exif=exif)
    halved = decode_original(data, what="image", max_pixels=10_000)
    whole = decode_original(data, what="image")

    size = (128, 256) if is_turned else (256, 128)
    for each in (halved, whole):
        assert (each.width, each.height) == size
    assert (whole.image.width, whole.image.height) == size
    assert (halved.image.width, halved.image.height) == (size[0] // 2, size[1] // 2)
    assert np.abs(pixels(halved.image).astype(int) - pixels(whole.image)[::2, ::2]).mean() < 3


def test_of_several_views_the_first_is_taken():
    """Telephones save the second one for depth or brightness."""
    first, second = Image.new("RGB", (256, 128), "red"), Image.new("RGB", (64, 64), "blue")
    data = saved(first, "MPO", save_all=True, append_images=[second])
    halved = decode_original(data, what="image", max_pixels=10_000)

    assert (halved.image.width, halved.image.height) == (128, 64)
    assert pixels(halved.image)[0, 0, 0] > 200


def test_up_to_25_million_pixels_nothing_is_halved():
    """What the model reads of such a picture is what diffusers would give it."""
    whole = decode_original(flat_jpeg(512, 256), what="image", max_pixels=512 * 256)

    assert (whole.image.width, whole.image.height) == (512, 256)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (flat_jpeg(8000, 8032), "more than 64 million pixels; scale it down"),
        (flat_jpeg(*LARGE).replace(b"\xff\xc0", b"\xff\xc2", 1), "is a progressive JPEG of more"),
        (png_bomb(*LARGE), "more than 25 million pixels; scale it down"),
        (webp_of(*LARGE), "more than 25 million pixels; scale it down"),
    ],
    ids=["too large", "progressive", "png", "webp"],
)
def test_what_cannot_be_halved_is_refused(data, words):
    """Before any of it is decoded."""
    assert words in refusal(data)


def test_a_baseline_jpeg_of_several_scans_is_refused_too():
    """It needs all its coefficients in memory as a progressive one does."""
    data = flat_jpeg(*LARGE)
    scan = data[data.index(b"\xff\xda") :]

    assert "is a progressive JPEG of more" in refusal(data[:-2] + scan)


def test_the_rules_for_masks_are_those_of_the_whole_picture():
    """One of half its size does not fit; one of its own is too large, and it is said what helps."""
    half = saved(Image.new("LA", (LARGE[0] // 2, LARGE[1] // 2)), "PNG", compress_level=1)

    assert "is 2816x2240 and the first image 5632x4480" in refusal(flat_jpeg(*LARGE), mask=half)
    words = refusal(flat_jpeg(*LARGE), mask=png_bomb(*LARGE))
    assert "more than 25 million pixels; scale it and its picture down" in words


def test_a_painted_mask_is_scaled_to_it():
    """As AUTOMATIC1111's clients send it, in the size of the result."""
    mask = Upload(saved(Image.new("L", (704, 560), 255), "PNG"), "mask", repaints=WHITE)
    edit = prepare([Upload(flat_jpeg(*LARGE), "image")], mask, (704, 560), nearest)

    assert edit.mask is not None
    assert (edit.mask.width, edit.mask.height) == (2816, 2240)
    assert (edit.references[0].width, edit.references[0].height) == (704, 560)


@pytest.mark.full
async def test_the_largest_takes_half_the_memory_that_a_decoder_may_have():
    """64 million pixels of full colour, in a process that has the half."""
    limits = Limits()
    pool = DecoderPool(limits=Limits(memory_bytes=limits.memory_bytes // 2))
    try:
        upload = Upload(flat_jpeg(8000, 8000), "image")
        edit = await pool.prepare([upload], None, None, nearest, client="a")
    finally:
        pool.kill()

    assert MAX_PIXELS < MAX_JPEG_PIXELS == 8000 * 8000
    assert (edit.references[0].width, edit.references[0].height) == (1024, 1024)
    assert set(edit.references[0].pixels) == {128}
