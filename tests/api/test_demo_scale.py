"""`KLEIN_DEMO_SCALE`: what the demo cannot make is made at another size and scaled, with a word."""

from __future__ import annotations

import base64
import io
import json
import threading

import httpx
import pytest
from PIL import Image

from app.api.app import create_app
from app.domain import Progress, RawImage, Stage
from app.engine.models.registry import find_spec
from app.images import formats
from app.limits import Limits
from app.runtime import build_runtime
from app.settings import Settings
from tests.api.conftest import client_of
from tests.api.pictures import data_url, mask, photo
from tests.support.in_process import InProcess

KLEIN = Limits.of(find_spec("flux.2-klein-4b"), 4_194_304)
SAID = "made at 512x512 and scaled to 640x640, which the demo model cannot make"
ROUTE = "/v1/images/generations"


@pytest.fixture
async def running():
    """The real service with the demo's limits; its pictures are grey."""
    return InProcess(model="shapes", scaled=KLEIN)


@pytest.fixture
async def client(running):
    """A client of it."""
    async with client_of(create_app(Settings.read({}), lambda _: running)) as client:
        yield client


@pytest.fixture
def specs(running):
    """What the worker was asked to make."""
    made, run = [], running.worker.run

    def watched(job_id, spec, on_progress):
        made.append(spec)
        return run(job_id, spec, on_progress)

    running.worker.run = watched
    return made


def size_of(data: bytes | str) -> tuple[int, int]:
    """The size of a picture, in base64 or not."""
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)).size


def events(response: httpx.Response) -> list[dict[str, object]]:
    """What a stream carries."""
    lines = response.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


async def test_generate(client, specs):
    """The file has the size that was asked for, and so has its note."""
    response = await client.post("/generate", json={"prompt": "a", "width": 1024, "height": 1024})

    assert response.status_code == 200
    assert size_of(response.content) == (1024, 1024)
    assert response.headers["x-klein-warnings"] == SAID.replace("640", "1024")
    assert [(spec.width, spec.height) for spec in specs] == [(512, 512)]


async def test_openais_routes(client, specs):
    """`size` and `usage` are those of the picture that comes back."""
    response = await client.post(ROUTE, json={"prompt": "a", "size": "640x640", "n": 2})
    body = response.json()

    assert [size_of(each["b64_json"]) for each in body["data"]] == [(640, 640)] * 2
    assert (body["size"], body["warnings"]) == ("640x640", [SAID])
    assert body["usage"]["output_tokens"] == 2 * 40 * 40
    assert response.headers["x-klein-warnings"] == SAID
    assert [(spec.width, spec.height) for spec in specs] == [(512, 512)] * 2


async def test_a_stream(client, running):
    """Its partial images too; the header comes before any picture."""

    async def run(job_id, spec, on_progress):
        small = RawImage(128, 128, bytes(3 * 128 * 128))
        on_progress(Progress(Stage.DENOISE, 1, 4, small))
        return await type(running.worker).run(running.worker, job_id, spec, on_progress)

    running.worker.run = run
    body = {"prompt": "a", "size": "768x512", "stream": True, "partial_images": 1}
    response = await client.post(ROUTE, json=body)
    partial, completed = events(response)

    said = "made at 512x336 and scaled to 768x512, which the demo model cannot make"
    assert response.headers["x-klein-warnings"] == said
    assert partial["type"] == "image_generation.partial_image"
    for each in (partial, completed):
        assert each["size"] == "768x512"
        assert size_of(each["b64_json"]) == (768, 512)
    assert completed["warnings"] == [said]


async def test_automatic1111s_dialect(client, specs):
    """In the notes of `info`."""
    response = await client.post(
        "/sdapi/v1/txt2img", json={"prompt": "a", "width": 640, "height": 640}
    )
    info = json.loads(response.json()["info"])

    assert size_of(response.json()["images"][0]) == (640, 640)
    assert (info["width"], info["height"], info["notes"]) == (640, 640, [SAID])
    assert response.headers["x-klein-warnings"] == SAID


@pytest.mark.parametrize("route", ["/generate", "/v1/images/edits", "/sdapi/v1/img2img"])
async def test_edits(client, specs, route):
    """With references, by every route."""
    picture = data_url(photo(256, 256))
    pictures = {
        "/generate": {"images": [picture], "width": 640, "height": 640},
        "/v1/images/edits": {"images": [{"image_url": picture}], "size": "640x640"},
        "/sdapi/v1/img2img": {"init_images": [picture], "width": 640, "height": 640},
    }
    response = await client.post(route, json={"prompt": "a", **pictures[route]})

    assert response.status_code == 200, response.text
    assert response.headers["x-klein-warnings"] == SAID
    assert [(spec.width, spec.height) for spec in specs] == [(512, 512)]
    assert specs[0].references


@pytest.mark.parametrize(("size", "status"), [("768x256", 200), ("640x640", 400)])
async def test_of_a_masked_edit_the_shape_that_was_asked_for_counts(client, specs, size, status):
    """What it is made at may differ from it by more than a mask allows."""
    body = {
        "prompt": "a",
        "images": [{"image_url": data_url(photo(768, 256))}],
        "mask": {"image_url": data_url(mask(768, 256))},
        "size": size,
    }
    response = await client.post("/v1/images/edits", json=body)

    assert response.status_code == status, response.text
    assert [(spec.width, spec.height) for spec in specs] == [(512, 176)] * (status == 200)


async def test_what_the_demo_can_make_is_not_scaled(client, specs):
    """Nor what follows a picture, of whatever size."""
    plain = await client.post(ROUTE, json={"prompt": "a", "size": "512x256"})
    followed = await client.post(
        "/v1/images/edits",
        json={"prompt": "a", "images": [{"image_url": data_url(photo(1024, 1024))}]},
    )

    assert [spec.scaled_to for spec in specs] == [None, None]
    assert followed.json()["size"] == "512x512"
    for response in (plain, followed):
        assert "warnings" not in response.json()
        assert "x-klein-warnings" not in response.headers


@pytest.mark.parametrize(("asked", "made"), [("64x64", (128, 128)), ("64x192", (128, 384))])
async def test_a_small_one_is_made_larger(client, specs, asked, made):
    """In its own shape."""
    response = await client.post(ROUTE, json={"prompt": "a", "size": asked})

    assert "x".join(map(str, size_of(response.json()["data"][0]["b64_json"]))) == asked
    assert (specs[0].width, specs[0].height) == made


@pytest.mark.parametrize(
    ("size", "nearest"), [("1000x1000", "1008x1008"), ("4096x4096", "2048x2048"), ("big", "1024")]
)
async def test_what_klein_refuses_is_refused(client, specs, size, nearest):
    """With the nearest that may be asked for; so what works with the demo works with klein."""
    response = await client.post(ROUTE, json={"prompt": "a", "size": size})

    assert response.status_code == 400
    assert f"nearest valid size is {nearest}" in response.json()["error"]["message"]
    assert not specs


async def test_scaling_leaves_the_event_loop_alone(client, monkeypatch):
    """It takes up to a tenth of a second."""
    threads = []
    monkeypatch.setattr(
        formats,
        "resize",
        lambda image, *size, run=formats.resize: (
            threads.append(threading.current_thread()) or run(image, *size)
        ),
    )
    await client.post(ROUTE, json={"prompt": "a", "size": "640x640"})

    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_the_document_says_what_may_be_asked_for(client):
    """The page's own choice stays what the demo makes."""
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    limits = (await client.get("/health")).json()["limits"]

    assert body["schema"]["properties"]["width"]["maximum"] == 4096
    assert (limits["max_side"], limits["scaled"]["max_side"]) == (512, 4096)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"model": "shapes"}, True),
        ({"model": "auto"}, True),
        ({"model": "shapes", "demo_scale": False}, False),
        ({"model": "/", "variant": "shapes"}, False),
        ({"model": "/"}, False),
    ],
    ids=str,
)
async def test_only_the_embedded_demo_scales(settings, scales):
    """Not a checkpoint that is served under its name, and no real model."""
    built = build_runtime(Settings(device="cpu", **settings), make_engine=lambda config: None)
    limits = built.service.limits
    await built.close()

    assert (limits.scaled is not None) == scales
    if scales:
        assert limits.scaled == KLEIN
