"""An output format is one entry of the registry: whatever names formats knows it from then on."""

from __future__ import annotations

import base64
import json

import pytest

from app.cli.main import main
from app.images import OutputFormat, encode
from app.images.formats import OUTPUT_FORMATS, ImageFormat
from tests.api.conftest import error_of
from tests.images import noise

GENERATIONS = "/v1/images/generations"


def encode_dummy(image, quality, metadata, helpers) -> bytes:
    """A file of no known format."""
    return b"dummy %dx%d %d" % (image.width, image.height, quality)


@pytest.fixture
def dummy(monkeypatch) -> dict[str, object]:
    """Registers it; what asks for it."""
    entry = ImageFormat("dummy", "image/x-dummy", (".dum",), encode_dummy, aliases=("dmy",))
    monkeypatch.setitem(OUTPUT_FORMATS, "dummy", entry)
    return {"prompt": "a", "size": "64x64", "output_format": "dummy", "output_compression": 50}


FILE = b"dummy 64x64 50"


async def test_generate_answers_with_it(client, dummy):
    """With its media type; its alias is OpenAI's."""
    size = {"width": 64, "height": 64}
    body = {name: value for name, value in dummy.items() if name != "size"} | size
    answer = await client.post("/generate", json=body)
    refused = await client.post("/generate", json=body | {"output_format": "dmy"})

    assert (answer.headers["content-type"], answer.content) == ("image/x-dummy", FILE)
    assert error_of(refused)["message"].endswith("png, jpeg, webp, dummy.")


@pytest.mark.parametrize("name", ["dummy", "dmy"])
async def test_images_answers_with_it(client, dummy, name):
    """Under its name and its alias, and names it as what was made."""
    answer = (await client.post(GENERATIONS, json=dummy | {"output_format": name})).json()

    assert answer["output_format"] == "dummy"
    assert base64.b64decode(answer["data"][0]["b64_json"]) == FILE


async def test_a_stream_carries_it(client, dummy):
    """In previews and at the end."""
    body = dummy | {"stream": True, "partial_images": 1}
    lines = (await client.post(GENERATIONS, json=body)).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:"]

    assert [event["output_format"] for event in events] == ["dummy", "dummy"]
    assert [base64.b64decode(event["b64_json"]) for event in events] == [FILE, FILE]


async def test_a_link_leads_to_it(serve, dummy):
    """With its name at the end of the address, and its media type."""
    client = await serve(image_urls=True)
    asked = await client.post(GENERATIONS, json=dummy | {"response_format": "url"})
    url = asked.json()["data"][0]["url"]
    file = await client.get(url)

    assert url.endswith(".dummy")
    assert (file.headers["content-type"], file.content) == ("image/x-dummy", FILE)


async def test_the_document_and_the_page_learn_of_it(client, dummy):
    """From `/openapi.json` as a value and a media type, from `/health` by name."""
    document = (await client.get("/openapi.json")).json()
    paths = document["paths"]
    contents = [
        paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        for path in ("/generate", GENERATIONS)
    ]

    assert [content["output_format"]["enum"] for content in contents] == [
        ["png", "jpeg", "webp", "dummy", None],
        ["png", "jpeg", "webp", "dummy", "jpg", "dmy", None],
    ]
    assert contents[0]["output_compression"]["description"].startswith(
        "Quality of jpeg, webp and dummy; png"
    )
    assert "image/x-dummy" in paths["/generate"]["post"]["responses"]["200"]["content"]
    assert (await client.get("/health")).json()["output_formats"] == list(OUTPUT_FORMATS)


async def test_refusals_name_it(client, dummy):
    """Among what may be asked for instead."""
    gif = await client.post(GENERATIONS, json=dummy | {"output_format": "gif"})
    png = await client.post("/generate", json={**dummy, "size": None, "output_format": "png"})

    assert error_of(gif)["message"].endswith("take png, jpeg, webp or dummy.")
    assert error_of(png)["message"].endswith("or take jpeg, webp or dummy.")


def test_the_command_line_takes_its_suffix(dummy, capsys):
    """And names it beside the others."""
    assert main(["generate", "a", "--local", "-o", "x.gif"]) == 1
    assert "must end in .png, .jpg, .jpeg, .webp or .dum." in capsys.readouterr().err


def test_an_unknown_format_is_never_written_as_another():
    """Only entries of the registry are encoded."""
    with pytest.raises(KeyError):
        encode(noise(8, 8), OutputFormat("tiff"))
