"""Open WebUI's default engine, SillyTavern and Dify: their requests byte for byte, and what each
reads of the answers.

Bodies follow the clients' sources, heads come from the HTTP libraries that they use. The key is
the password of Basic authentication, as each of them sends it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json

import pytest
from PIL import Image

from app.domain import ImageSpec
from tests.api.apps import app_on
from tests.api.sockets import listening, until
from tests.support.recorded import exchange, recorded, without

KEY = "house-key-1234"


@pytest.fixture
async def port(runtime):
    """A server with a key."""
    async with listening(app_on(runtime, api_keys=(KEY,))) as port:
        yield port


@pytest.fixture
def send(port):
    """Send a recorded request, which must be answered with 200; returns the answer's JSON."""

    async def send(name: str):
        answer = await exchange(port, recorded(name))
        assert answer.status == 200, answer.body
        return answer.json()

    return send


def picture(data: str) -> Image.Image:
    """Decode base64 as a client does."""
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))

    assert image.format == "PNG"

    return image


def made_of(spec: ImageSpec) -> tuple[int, int, int, float]:
    """What these clients choose of a picture."""
    return spec.width, spec.height, spec.num_inference_steps, spec.guidance_scale


async def test_open_webui(send, service):
    """It verifies the address, lists models, sets the one that is chosen, and makes a picture."""
    options = await send("open-webui-1-options")
    (model,) = await send("open-webui-2-models")

    assert model["title"] == options["sd_model_checkpoint"] == "flux.2-klein-4b"
    assert model["model_name"]
    assert await send("open-webui-3-set-options") is None

    made = await send("open-webui-4-txt2img")

    assert [picture(each).size for each in made["images"]] == [(512, 512)]
    assert "," not in made["images"][0]  # else it is taken for a data URL
    assert isinstance(made["info"], str)
    assert [made_of(spec) for spec in service.specs] == [(512, 512, 4, 1.0)]
    assert service.specs[0].prompt == "A red circle on a blue background"


async def test_sillytavern(send, service):
    """It looks for Forge, fills its lists, sets the chosen model, and makes a picture."""
    options = await send("sillytavern-1-options")

    assert "forge_preset" not in options
    assert [each["name"] for each in await send("sillytavern-2-upscalers")] == ["None"]
    await send("sillytavern-3-set-options")

    made = await send("sillytavern-4-txt2img")

    assert picture(made["images"][0]).size == (512, 512)
    assert KEY not in json.dumps(made["parameters"])  # it sends its password in the body too
    assert [made_of(spec) for spec in service.specs] == [(512, 512, 4, 1.0)]
    assert await send("sillytavern-5-interrupt") == {}


async def test_sillytavern_whose_user_stops_it(port, runtime, service, send):
    """It interrupts and closes the connection; either would do."""
    service.script.release = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(recorded("sillytavern-4-txt2img"))
    async with asyncio.timeout(5):
        await service.asked.wait()
        await send("sillytavern-5-interrupt")
        await service.tickets[0].ended.wait()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    assert service.tickets[0].was_cancelled


async def test_a_client_that_goes_stops_its_job(port, runtime, service):
    """As on the other routes."""
    service.script.release = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(recorded("open-webui-4-txt2img"))
    async with asyncio.timeout(5):
        await service.asked.wait()
        writer.close()
        await service.tickets[0].ended.wait()
        await until(lambda: runtime.metrics.finished)

    assert service.tickets[0].was_cancelled
    assert runtime.metrics.finished == [("/sdapi/v1/txt2img", "cancelled")]


async def test_dify(send, service):
    """It validates its model's name, sets it before each picture, and names no Content-Type."""
    assert "flux.2-klein-4b" in [each["model_name"] for each in await send("dify-1-models")]
    await send("dify-2-set-options")
    made = await send("dify-3-txt2img")

    assert picture(made["images"][0]).size == (1024, 1024)
    assert [made_of(spec) for spec in service.specs] == [(1024, 1024, 4, 1.0)]


async def test_without_the_key_nothing_is_made(port, service):
    """401, with the challenge that these clients know."""
    for name in ("open-webui-4-txt2img", "sillytavern-4-txt2img", "dify-3-txt2img"):
        answer = await exchange(port, without(recorded(name), "authorization"))

        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
    assert not service.tickets


async def test_json_without_a_type_is_read(client, service):
    """Dify's body by itself, where no key is set."""
    body = recorded("dify-3-txt2img").partition(b"\r\n\r\n")[2]
    response = await client.post("/sdapi/v1/txt2img", content=body)

    assert "content-type" not in response.request.headers
    assert response.status_code == 200
    assert len(service.tickets) == 1
