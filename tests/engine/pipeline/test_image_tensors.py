"""References on the way from an upload to the VAE encoder."""

from __future__ import annotations

import pytest
from PIL import Image

from app.domain import RawImage
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.pipeline.image_tensors import reference_tensor
from app.errors import InvalidRequest
from app.images.uploads import decode_upload, prepare_reference
from tests.images import saved

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((512, 64), (512, 64)),
        ((632, 79), (624, 64)),
        ((100, 799), (96, 784)),
        ((800, 100), (800, 96)),
        ((1000, 125), (992, 112)),
        ((512, 4096), (352, 2896)),
        ((8000, 1000), (2896, 352)),
    ],
)
def test_what_an_upload_may_be_is_read(size, read):
    """Up to 8:1, though cut to whole tokens it is longer than that."""
    upload = decode_upload(saved(Image.new("RGB", size), "PNG"), what="image")

    made = reference_tensor(prepare_reference(upload), FLUX2_KLEIN_4B)

    assert made.shape == (1, 3, *read[::-1])


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 656), (1200, 100)])
def test_what_no_upload_becomes_is_refused(width, height):
    """Too small, or longer than a picture of 8:1 can be when it was cut."""
    with pytest.raises(InvalidRequest, match=f"{width}x{height} cannot be used"):
        reference_tensor(RawImage(width, height, bytes(3 * width * height)), FLUX2_KLEIN_4B)
