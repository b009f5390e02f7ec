"""The exact requests of clients in wide use, and what each client reads of the answer.

Read in the clients' sources: names and order of the parts, headers, query. Each is sent to an app
on fakes and (marker slow) to a live service. The packages themselves run in `test_packages.py`.
"""

from __future__ import annotations

import asyncio
import base64
import io

import httpx
import pytest
from PIL import Image

from tests.api.pictures import black_and_white_mask, mask, photo
from tests.api.targets import Target, on_fakes, on_server

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"


@pytest.fixture(params=["fakes", pytest.param("live", marks=pytest.mark.slow)])
async def target(request):
    """One service after the other."""
    if request.param == "fakes":
        running = on_fakes()
    else:
        running = on_server(request.getfixturevalue("live_scripted"))
    async with running as target:
        yield target


async def generate(target: Target, *, query: str = "", headers=None, **body) -> dict:
    """Send JSON as the client does and return the answer."""
    response = await target.http.post(
        f"{target.url}{GENERATIONS}{query}", json=body, headers=headers or {}
    )

    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/json")

    return response.json()


async def edit(target: Target, parts, *, query: str = "", headers=None, chunked=False) -> dict:
    """Send a form as the client does and return the answer."""
    url = f"{target.url}{EDITS}{query}"
    request = target.http.build_request("POST", url, files=parts)
    body = b"".join(request.stream)

    async def stream():
        for start in range(0, len(body), 16_384):
            yield body[start : start + 16_384]

    response = await target.http.post(
        url,
        content=stream() if chunked else body,
        headers={"content-type": request.headers["content-type"], **(headers or {})},
    )

    assert response.status_code == 200, response.text

    return response.json()


def texts(**fields: str):
    """The text parts of a form, in their order."""
    return [(name, (None, value)) for name, value in fields.items()]


def png(data: str) -> Image.Image:
    """Decode base64 as a client does."""
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))

    assert image.format == "PNG"

    return image


async def fetch(target: Target, url: str) -> httpx.Response:
    """Follow a link without a key."""
    response = await target.http.get(url)

    assert response.headers["content-type"].split("/")[0] == "image"

    return response


@pytest.mark.parametrize("model", ["dall-e-2", "flux.2-klein-4b"])
async def test_open_webui_generates(target, model):
    """An empty key, an api-version in the query, 512x512; `url` must not be there."""
    answer = await generate(
        target,
        query="?api-version=2025-04-01",
        headers={"Authorization": "Bearer"},
        model=model,
        prompt="a",
        n=1,
        size="512x512",
        response_format="b64_json",
    )

    assert answer["data"][0].get("url") is None
    assert png(answer["data"][0]["b64_json"]).size == (512, 512)


async def test_open_webui_leaves_the_format_out_for_gpt_image(target):
    """With the admin's own parameters merged in."""
    answer = await generate(
        target, model="gpt-image-1", prompt="a", n=1, size="256x256", quality="high", seed=3
    )

    assert answer["data"][0]["seed"] == 3
    assert not answer["data"][0].get("url")


@pytest.mark.parametrize("names", [["image"], ["image[]"], ["image[]", "image[]"]])
async def test_open_webui_edits(target, names):
    """Texts first; one picture as `image`, a list, even of one, as `image[]`."""
    parts = texts(
        model="dall-e-2",
        prompt="a",
        n="1",
        size="256x256",
        background="auto",
        response_format="b64_json",
    )
    parts += [(name, (f"{name}.png", photo(), "image/png")) for name in names]
    answer = await edit(target, parts)

    assert png(answer["data"][0]["b64_json"]).size == (256, 256)


@pytest.mark.parametrize(
    "azure", [{}, {"query": "?api-version=2025-04-01", "headers": {"api-key": "none-at-all"}}]
)
async def test_librechat_generates(target, azure):
    """All of its defaults are `auto`."""
    answer = await generate(
        target,
        **azure,
        model="gpt-image-1",
        prompt="a",
        n=1,
        background="auto",
        output_format="png",
        quality="auto",
        size="auto",
    )

    assert png(answer["data"][0]["b64_json"]).size == (1024, 1024)


async def test_librechat_hands_a_refusal_to_its_language_model(target):
    """So the message must say what to do, in one sentence."""
    body = {"model": "gpt-image-1", "prompt": "a", "background": "transparent"}
    response = await target.http.post(target.url + GENERATIONS, json=body)
    error = response.json()["error"]

    assert response.status_code == 400
    assert "opaque" in error["message"]
    assert error["message"].count(". ") == 0


async def test_librechat_edits(target):
    """Chunked, with no length, each picture as `image[]`."""
    parts = texts(model="gpt-image-1", prompt="a", quality="auto", size="auto")
    parts += [("image[]", (f"{i}.webp", photo(format="WEBP"), "image/webp")) for i in range(2)]
    answer = await edit(target, parts, chunked=True)

    assert png(answer["data"][0]["b64_json"]).size == (128, 128)


async def test_librechats_dalle_tool_reads_a_link(target):
    """It asks for nothing and reads `.url`."""
    answer = await generate(
        target,
        model="dall-e-3",
        quality="standard",
        style="vivid",
        size="1024x1024",
        prompt="a",
        n=1,
    )

    await fetch(target, answer["data"][0]["url"])


async def test_async_openai_edits(target):
    """Rust's `CreateImageEditRequest` sends the compression twice."""
    parts = [("prompt", (None, "a")), ("image", ("a.png", photo())), ("mask", ("b.png", mask()))]
    parts += texts(model="gpt-image-1", n="1", size="256x256", output_format="webp")
    parts += 2 * texts(output_compression="80") + texts(user="u", quality="high")
    answer = await edit(target, parts)

    assert (answer["size"], answer["output_format"]) == ("256x256", "webp")


async def test_a_painters_mask_is_black_and_white(target):
    """As front ends of Stable Diffusion send it; the answer says how it was read."""
    parts = [("image", ("a.png", photo())), ("mask", ("b.png", black_and_white_mask()))]
    answer = await edit(target, parts + texts(prompt="a"))

    assert answer["warnings"] == ["mask has no transparency: white was repainted, and black kept"]


async def test_langchain_joins_links(target):
    """`DallEAPIWrapper.run`."""
    answer = await generate(target, prompt="a", n=2, size="256x256", model="dall-e-2")
    joined = "\n".join(item["url"] for item in answer["data"])

    assert len(joined.split("\n")) == 2


async def test_langchain_js_asks_for_links(target):
    """With DALL-E 3's own words for style and quality."""
    answer = await generate(
        target,
        model="dall-e-3",
        prompt="a",
        n=1,
        size="1024x1024",
        response_format="url",
        style="vivid",
        quality="standard",
    )

    await fetch(target, answer["data"][0]["url"])


async def test_litellm_generates_and_edits(target):
    """Only what was given, extras in the JSON; edits always as `image[]`, path as file name."""
    answer = await generate(target, model="flux.2-klein-4b", prompt="a", size="256x256", seed=9)
    edited = await edit(
        target,
        [
            ("image[]", ("/home/user/a.png", photo(), "image/png")),
            ("mask", ("/home/user/m.png", mask(), "image/png")),
            *texts(model="flux.2-klein-4b", prompt="a", n="2"),
        ],
    )

    assert answer["data"][0]["seed"] == 9
    assert len(edited["data"]) == 2
    assert isinstance(answer["created"], int)


@pytest.mark.parametrize("kind", ["b64_json", "url"])
async def test_n8n_generates(target, kind):
    """Either form, with DALL-E 3's options."""
    answer = await generate(
        target,
        prompt="a",
        model="dall-e-3",
        response_format=kind,
        n=1,
        size="1024x1024",
        quality="hd",
        style="natural",
    )

    assert answer["data"][0][kind]


async def test_n8n_edits(target):
    """Files first, and always 1024x1024, whatever the picture's size."""
    parts = [("image[]", ("data.png", photo(), "image/png"))]
    parts += texts(prompt="a", model="gpt-image-1", n="1", size="1024x1024", quality="auto")
    answer = await edit(target, parts)

    assert png(answer["data"][0]["b64_json"]).size == (1024, 1024)


async def test_n8n_finds_its_names_on_request(target):
    """Its picker shows only ids that begin with dall- or gpt-image; typed in, they work."""
    for name in ("gpt-image-1", "dall-e-3"):
        response = await target.http.get(f"{target.url}/v1/models/{name}")

        assert response.json()["id"] == name


async def test_dify_wants_usage_whole(target):
    """Its edit tool loses the picture otherwise; its key check lists the models."""
    listed = await target.http.get(f"{target.url}/v1/models", headers={"authorization": "Bearer x"})
    dalle = await generate(
        target,
        prompt="a",
        model="dall-e-3",
        size="1024x1024",
        n=1,
        response_format="b64_json",
        style="vivid",
        quality="standard",
    )
    parts = texts(model="gpt-image-1-mini", prompt="a", n="1", size="auto", quality="auto")
    parts += [("image[]", ("a.png", photo(), "image/png"))] * 2
    edited = await edit(target, parts)

    assert listed.json()["data"]
    for answer in (dalle, edited):
        usage = answer["usage"]

        assert {"input_tokens", "output_tokens", "total_tokens"} < set(usage)
        assert {"text_tokens", "image_tokens"} == set(usage["input_tokens_details"])


async def test_home_assistant_fetches_its_picture(target):
    """DALL-E 3 with a link, whose bytes it shows."""
    answer = await generate(
        target,
        model="dall-e-3",
        prompt="a",
        size="1024x1024",
        quality="standard",
        style="vivid",
        response_format="url",
        n=1,
    )
    picture = await fetch(target, answer["data"][0]["url"])

    assert picture.content.startswith(b"\x89PNG")


async def test_the_vercel_sdk_asks_in_parallel(target):
    """For an id that it does not know, three pictures are three calls: their seeds must differ."""
    answers = await asyncio.gather(
        *(
            generate(
                target,
                model="flux.2-klein-4b",
                prompt="a",
                n=1,
                size="256x256",
                response_format="b64_json",
            )
            for _ in range(3)
        )
    )

    assert len({answer["data"][0]["seed"] for answer in answers}) == 3
    assert all(isinstance(answer["data"][0]["b64_json"], str) for answer in answers)


@pytest.mark.parametrize("names", [["image"], ["image[]", "image[]"]])
async def test_the_vercel_sdk_edits(target, names):
    """One picture as `image`, several as `image[]`; blobs without a type of their own."""
    parts = texts(model="flux.2-klein-4b", prompt="a")
    parts += [(name, ("blob", photo(), "application/octet-stream")) for name in names]
    parts += [("mask", ("blob", mask(), "application/octet-stream")), *texts(n="1")]
    answer = await edit(target, parts)

    assert isinstance(answer["data"][0]["b64_json"], str)


async def test_anythingllm_generates_and_edits(target):
    """As its Lemonade provider: repeated `image`, named reference-0.png and so on."""
    made = await generate(target, model="flux.2-klein-4b", prompt="a", size="1024x1024", n=1)
    parts = texts(model="flux.2-klein-4b", prompt="a", size="1024x1024", n="1")
    parts += [("image", (f"reference-{i}.png", photo(), "image/png")) for i in range(2)]
    edited = await edit(target, parts)

    for answer in (made, edited):
        assert png(answer["data"][0]["b64_json"]).size == (1024, 1024)


async def test_nextcloud_probes_and_generates(target):
    """Its probe must not be answered with 404, nor with a picture; its list must not be empty."""
    before = target.count_accepted()
    probe = await target.http.post(
        target.url + GENERATIONS, json={"prompt": "a", "model": "invalid-model"}
    )

    assert probe.status_code == 400
    assert target.count_accepted() == before
    assert (await target.http.get(f"{target.url}/v1/models")).json()["data"]

    answer = await generate(target, prompt="a", size="1024x1024", n=2, model="flux.2-klein-4b")
    too_many = await target.http.post(
        target.url + GENERATIONS, json={"prompt": "a", "size": "1024x1024", "n": 12}
    )

    assert all(item.get("b64_json") or item.get("url") for item in answer["data"])
    assert too_many.status_code == 400


async def test_sillytavern_generates(target):
    """With DALL-E 3's options and base64."""
    answer = await generate(
        target,
        prompt="a",
        model="dall-e-3",
        size="1024x1024",
        n=1,
        quality="hd",
        style="natural",
        response_format="b64_json",
    )

    assert png(answer["data"][0]["b64_json"]).size == (1024, 1024)
