"""Pictures for clients of AUTOMATIC1111's API, by the demo model."""

from __future__ import annotations

import base64
import io
import json
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.support.recorded import exchange, recorded

pytestmark = [pytest.mark.slow, pytest.mark.torch]


@pytest.mark.full
@pytest.mark.parametrize("name", ["open-webui-4-txt2img", "sillytavern-4-txt2img"])
async def test_a_recorded_request_gets_its_picture(shapes, name):
    """A red circle on a blue ground, in the size that these clients ask for by default."""
    answer = await exchange(urlsplit(shapes.url).port, recorded(name))
    assert answer.status == 200, answer.body
    (data,) = answer.json()["images"]
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))

    assert image.size == (512, 512)
    red, _, blue = image.convert("RGB").getpixel((8, 8))
    assert blue > red


@pytest.mark.full
async def test_white_of_a_mask_is_repainted_and_black_kept(shapes):
    """Pixel for pixel, through the decoder's process."""
    original = Image.radial_gradient("L").convert("RGB")
    mask = Image.new("L", original.size)
    mask.paste(255, (0, 0, 128, 256))

    def text(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    status, _, body = shapes.post(
        "/sdapi/v1/img2img",
        {"prompt": "a red circle", "init_images": [text(original)], "mask": text(mask), "seed": 1},
    )
    assert status == 200, body
    (data,) = json.loads(body)["images"]
    made = Image.open(io.BytesIO(base64.b64decode(data)))
    right = (128, 0, 256, 256)
    assert made.crop(right).tobytes() == original.crop(right).tobytes()
    assert made.tobytes() != original.tobytes()
