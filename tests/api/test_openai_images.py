"""`POST /v1/images/generations`: every field of the request and of the answer."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from app.engine.models.registry import find_spec
from app.errors import Kind
from tests.api.conftest import error_of

ROUTE = "/v1/images/generations"


async def post(client, **body):
    """Send one generation, with a prompt unless the test gives its own."""
    content = json.dumps({"prompt": "a", **body})
    return await client.post(ROUTE, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize("route", [ROUTE, "/v1/images"])
async def test_a_prompt_alone_gives_one_png_as_base64(client, route):
    """Both addresses answer alike."""
    response = await client.post(route, json={"prompt": "a"})
    body = response.json()
    (item,) = body["data"]

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert set(item) == {"b64_json", "seed"}
    assert Image.open(io.BytesIO(base64.b64decode(item["b64_json"], validate=True))).size == (
        1024,
        1024,
    )
    assert isinstance(body["created"], int)
    assert (body["model"], body["background"]) == ("flux.2-klein-4b", "opaque")
    assert (body["output_format"], body["size"]) == ("png", "1024x1024")
    assert not {"quality", "warnings"} & set(body)


async def test_usage_is_whole(client):
    """The SDK's strict mode and Dify want every key of it."""
    body = (await post(client, n=2, size="512x256")).json()

    assert body["usage"] == {
        "input_tokens": 12,
        "output_tokens": 2 * 32 * 16,
        "total_tokens": 12 + 2 * 32 * 16,
        "input_tokens_details": {"text_tokens": 12, "image_tokens": 0},
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 2 * 32 * 16},
    }


async def test_n_pictures_have_n_seeds_in_order(client, service):
    """Image i has seed+i, and the answer says so."""
    body = (await post(client, n=3, seed=5)).json()

    assert [item["seed"] for item in body["data"]] == [5, 6, 7]
    assert [spec.seed for spec in service.specs] == [5, 6, 7]
    assert len({item["b64_json"] for item in body["data"]}) == 3
    assert len(service.tickets) == 1


async def test_a_random_seed_leaves_room_for_n(client, service, monkeypatch):
    """However large the number drawn, the last seed survives JavaScript."""
    monkeypatch.setattr(service, "random_seed", lambda: 2**53 - 1)
    body = (await post(client, n=10)).json()

    assert body["data"][-1]["seed"] == 2**53 - 1


@pytest.mark.parametrize(
    ("sent", "size"),
    [
        ({"size": "auto"}, (1024, 1024)),
        ({"size": None}, (1024, 1024)),
        ({"size": "256x256"}, (256, 256)),
        ({"size": "1536x1024"}, (1536, 1024)),
        ({"size": "1024x1792"}, (1024, 1792)),
        ({"size": "1792x1024"}, (1792, 1024)),
        ({"size": "2048x2048"}, (2048, 2048)),
        ({"width": 768, "height": 1344}, (768, 1344)),
        ({"width": 768, "height": 1344, "size": "768x1344"}, (768, 1344)),
        ({"width": 768, "height": 1344, "size": "auto"}, (768, 1344)),
    ],
    ids=str,
)
async def test_the_size_is_the_one_asked_for(client, service, sent, size):
    """In the spec and in the answer, to the pixel."""
    body = (await post(client, **sent)).json()
    (spec,) = service.specs

    assert size == (spec.width, spec.height)
    assert f"{size[0]}x{size[1]}" == body["size"]


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ("1000x1000", "1008x1008"),
        ("1920x1080", "1920x1088"),
        ("0x0", "64x64"),
        ("4096x4096", "2048x2048"),
        ("2048x512", "1536x512"),
        ("1024X1024", "1024x1024"),
        ("1024*768", "1024x768"),
        ("99999x16", "192x64"),
        ("1024", "1024x1024"),
        ("", "1024x1024"),
        ("large", "1024x1024"),
        ("1024x1024\n", "1024x1024"),
        ("١٠٢٤x١٠٢٤", "1024x1024"),
    ],
)
async def test_a_size_that_does_not_fit_names_the_nearest_that_does(client, service, size, nearest):
    """Never snapped; the message can be pasted back."""
    response = await post(client, size=size)

    assert response.status_code == 400
    assert error_of(response)["param"] == "size"
    assert nearest in str(error_of(response)["message"])
    assert not service.tickets


@pytest.mark.parametrize(
    "sent",
    [
        {"quality": quality}
        for quality in ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")
    ]
    + [
        {"style": "vivid"},
        {"style": "natural"},
        {"moderation": "low"},
        {"user": "u"},
        {"safety_identifier": "s"},
        {"complexity": "high"},
        {"background": "opaque"},
        {"background": "auto"},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"response_format": "b64_json"},
        {"stream": False},
        {"partial_images": 0},
        {"output_compression": 100},
        {"model": ""},
    ],
    ids=str,
)
async def test_what_cannot_change_the_picture_does_not(client, sent):
    """Accepted, checked, and without effect: the same seed gives the same bytes."""
    plain = (await post(client, seed=1)).json()["data"]
    response = await post(client, seed=1, **sent)

    assert response.status_code == 200
    assert plain == response.json()["data"]


@pytest.mark.parametrize(
    ("asked", "echoed"),
    [("low", "low"), ("max", "max"), ("auto", None), ("standard", None), ("hd", None)],
)
async def test_quality_is_echoed_only_where_the_sdk_knows_it(client, asked, echoed):
    """Its strict mode fails on any other word."""
    assert echoed == (await post(client, quality=asked)).json().get("quality")


async def test_every_field_may_be_null(client):
    """The SDK sends null for None."""
    names = ("model", "n", "size", "quality", "response_format", "output_format", "background")
    names += ("output_compression", "moderation", "style", "user", "stream", "partial_images")
    names += ("seed", "steps", "num_inference_steps", "guidance_scale", "negative_prompt", "svg")
    names += ("width", "height", "made_up")
    response = await post(client, **dict.fromkeys(names))

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("sent", "param", "code"),
    [
        ({"prompt": "  "}, "prompt", "invalid_value"),
        ({"prompt": "a" * 32_001}, "prompt", "string_above_max_length"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 10**9}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": [1]}, "n", "invalid_type"),
        ({"size": 1024}, "size", "invalid_type"),
        ({"width": 512}, "height", "missing_required_parameter"),
        ({"height": 512}, "width", "missing_required_parameter"),
        ({"width": 512, "height": 500}, "height", "invalid_value"),
        ({"width": 512, "height": 512, "size": "256x256"}, "width", "invalid_value"),
        ({"quality": "ultra"}, "quality", "invalid_value"),
        ({"response_format": "png"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "unsupported_value"),
        ({"output_format": "svg"}, "output_format", "unsupported_value"),
        ({"output_format": "bmp"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_png_output_compression"),
        ({"output_compression": -1}, "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_value"),
        ({"moderation": "high"}, "moderation", "invalid_value"),
        ({"style": "loud"}, "style", "invalid_value"),
        ({"user": 7}, "user", "invalid_type"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"partial_images": 2}, "partial_images", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"svg": {}}, "svg", "unsupported_parameter"),
        ({"frame_count": 2}, "frame_count", "unsupported_parameter"),
        ({"frame_duration_ms": 2}, "frame_duration_ms", "unsupported_parameter"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "invalid_value"),
        ({"steps": 4, "num_inference_steps": 5}, "steps", "invalid_value"),
        ({"guidance_scale": 4}, "guidance_scale", "unsupported_value"),
        ({"guidance_scale": 1e999}, "guidance_scale", None),
        ({"negative_prompt": "x"}, "negative_prompt", "unsupported_parameter"),
        ({"num_steps": 4}, "num_steps", "unknown_parameter"),
        ({"cfg_scale": 4}, "cfg_scale", "unknown_parameter"),
        ({"image": "x"}, "image", "unknown_parameter"),
        ({"model": "invalid-model"}, "model", "model_not_found"),
        ({"model": "../../etc/passwd"}, "model", "model_not_found"),
        ({"model": "black-forest-labs/FLUX.2-klein-9B"}, "model", "model_not_found"),
    ],
    ids=str,
)
async def test_what_cannot_be_honoured_is_refused_by_name(client, service, sent, param, code):
    """400 with the field and OpenAI's code, before anything is queued."""
    response = await post(client, **sent)

    assert response.status_code == 400
    if code is None:  # not JSON at all
        assert error_of(response)["code"] == "invalid_json"
    else:
        assert (param, code) == (error_of(response)["param"], error_of(response)["code"])
    assert not service.tickets


@pytest.mark.parametrize(
    "name",
    [
        "flux.2-klein-4b",
        "black-forest-labs/FLUX.2-klein-4B",
        "BLACK-FOREST-LABS/flux.2-KLEIN-4b",
        "gpt-image-1",
        "gpt-image-1-mini",
        "chatgpt-image-latest",
    ],
)
async def test_the_names_of_the_served_model_are_taken(client, name):
    """Its id, its hub id, and the names that clients hard-code."""
    response = await post(client, model=name)

    assert response.status_code == 200
    assert response.json()["model"] == "flux.2-klein-4b"


async def test_aliases_can_be_switched_off(serve):
    """`KLEIN_MODEL_ALIASES=false`."""
    client = await serve(model_aliases=False)
    response = await post(client, model="gpt-image-1")

    assert error_of(response)["code"] == "model_not_found"


async def test_steps_is_an_alias(client, service):
    """Both and equal is fine too."""
    await post(client, steps=7)
    await post(client, steps=8, num_inference_steps=8)

    assert [spec.num_inference_steps for spec in service.specs] == [7, 8]


@pytest.mark.parametrize(
    ("asked", "answered"), [("jpg", "jpeg"), ("jpeg", "jpeg"), ("webp", "webp")]
)
async def test_the_real_format_is_reported(client, asked, answered):
    """`jpg` is `jpeg` to the SDK."""
    assert answered == (await post(client, output_format=asked)).json()["output_format"]


async def test_compression_reaches_the_encoder(client, service):
    """Less quality, fewer bytes."""
    sizes = [
        len((await post(client, output_format="jpeg", output_compression=quality)).content)
        for quality in (20, 90)
    ]

    assert sizes[0] < sizes[1]
    assert [ticket.output.compression for ticket in service.tickets] == [20, 90]


async def test_a_cut_prompt_is_reported_twice(client, service):
    """In `warnings` for programs, in a header for people; each sentence once."""
    service.script.warnings = ("prompt cut to 512 tokens",)
    response = await post(client, n=2)

    assert response.json()["warnings"] == ["prompt cut to 512 tokens"]
    assert response.headers["x-klein-warnings"] == "prompt cut to 512 tokens"


async def test_more_than_the_whole_queue_is_refused_for_good(client, service):
    """A 503 would be tried again for ever."""
    service.capacity = 4
    response = await post(client, n=5)

    assert response.status_code == 400
    assert error_of(response)["param"] == "n"


async def test_n_that_does_not_fit_now_takes_no_place(client, service):
    """All or none."""
    service.capacity = 4
    service.closed_by = Kind.QUEUE_FULL
    response = await post(client, n=2)

    assert response.status_code == 503
    assert not service.tickets


async def test_unknown_query_parameters_and_accept_do_not_matter(client):
    """Azure users append `?api-version=`, the SDK accepts JSON whatever it asks for."""
    response = await client.post(
        f"{ROUTE}?api-version=2024", json={"prompt": "a"}, headers={"accept": "text/html"}
    )

    assert response.status_code == 200


async def test_the_demo_model_has_limits_of_its_own(client, service):
    """`auto` is its default size, and the nearest size lies within its limits."""
    service.model = find_spec("shapes")
    await post(client)
    refused = await post(client, size="1024x1024")

    assert [(spec.width, spec.height) for spec in service.specs] == [(256, 256)]
    assert "512x512" in str(error_of(refused)["message"])


async def test_the_operators_limit_of_pixels_holds(client, service):
    """`KLEIN_MAX_PIXELS` below the model's own."""
    service.max_pixels = 1_835_008
    response = await post(client, size="2048x1024")

    assert "1,835,008" in str(error_of(response)["message"])


async def test_an_unknown_name_is_repeated_only_in_short(client):
    """A name may be long, or break a log line."""
    response = await post(client, **{"x\n" * 500: 1})
    param = error_of(response)["param"]

    assert len(str(param)) < 80
    assert "\n" not in str(param)
