"""`POST /generate`: one picture, its bytes, its headers."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from app.engine.models.registry import find_spec
from tests.api.conftest import error_of
from tests.api.pictures import data_url, mask, photo


async def test_a_prompt_alone_gives_a_png_of_the_models_size(client, service):
    """Everything else is the model's own default."""
    response = await client.post("/generate", json={"prompt": "a red circle"})
    (spec,) = service.specs

    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(response.content)).size == (1024, 1024)
    assert (spec.prompt, spec.num_inference_steps, spec.guidance_scale) == ("a red circle", 4, 1.0)


async def test_headers_tell_what_was_made(client, service):
    """Seed, memory, warnings and the seconds by stage, in milliseconds."""
    service.script.warnings = ("prompt cut to 512 tokens",)
    headers = (await client.post("/generate", json={"prompt": "a", "seed": 7})).headers

    assert headers["x-klein-seed"] == "7"
    assert headers["x-klein-peak-vram-bytes"] == "8000000000"
    assert headers["x-klein-warnings"] == "prompt cut to 512 tokens"
    assert headers["server-timing"].startswith("queue;dur=1.000, text;dur=20.000, reference;dur=0")
    assert headers["server-timing"].endswith("encode;dur=10.000, total;dur=531.000")
    assert headers["x-request-id"]


async def test_without_a_card_no_memory_is_claimed(client, service):
    """Absent, not 0."""
    service.script.peak = None
    headers = (await client.post("/generate", json={"prompt": "a"})).headers

    assert "x-klein-peak-vram-bytes" not in headers


@pytest.mark.parametrize(
    ("asked", "media_type", "magic"),
    [
        ("png", "image/png", b"\x89PNG"),
        ("jpeg", "image/jpeg", b"\xff\xd8"),
        ("webp", "image/webp", b"RIFF"),
    ],
)
async def test_the_format_is_what_was_asked_for(client, asked, media_type, magic):
    """In the header and in the bytes."""
    response = await client.post("/generate", json={"prompt": "a", "output_format": asked})

    assert media_type == response.headers["content-type"]
    assert response.content.startswith(magic)


async def test_every_field_reaches_the_spec(client, service):
    """Nothing is lost on the way."""
    asked = {"width": 512, "height": 768, "num_inference_steps": 8, "guidance_scale": 1, "seed": 0}
    await client.post("/generate", json={"prompt": "a", **asked})
    (spec,) = service.specs

    assert asked == {name: getattr(spec, name) for name in asked}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"size": "512x768"}, (512, 768)),
        ({"size": "auto"}, (1024, 1024)),
        ({"size": None, "width": 512}, (512, 1024)),
        ({"size": "512x768", "width": 512, "height": 768}, (512, 768)),
        ({"size": "auto", "width": 512, "height": 768}, (512, 768)),
    ],
)
async def test_the_size_may_be_one_text(client, service, asked, expected):
    """As for OpenAI's routes; beside width and height it must say the same."""
    response = await client.post("/generate", json={"prompt": "a", **asked})

    assert response.status_code == 200
    assert (service.specs[0].width, service.specs[0].height) == expected


async def test_the_size_of_an_edit_may_be_one_text(client, service):
    """Instead of the first picture's."""
    body = {"prompt": "a", "size": "512x256", "images": [data_url(photo())]}
    await client.post("/generate", json=body)

    assert (service.specs[0].width, service.specs[0].height) == (512, 256)


async def test_an_error_names_the_size_where_that_was_sent(client, service):
    """Found by the plan or over a mask, not only in the text."""
    picture = {"images": [data_url(photo())], "mask": data_url(mask())}
    masked = await client.post("/generate", json={"prompt": "a", "size": "256x128", **picture})
    service.plan_pixels = (65_536,)
    planned = await client.post("/generate", json={"prompt": "a", "size": "512x512"})

    assert error_of(masked)["param"] == error_of(planned)["param"] == "size"


@pytest.mark.parametrize("seed", [None, -1])
async def test_a_seed_is_drawn_where_none_is_given(client, service, seed):
    """And two requests get two."""
    for _ in range(2):
        await client.post("/generate", json={"prompt": "a", "seed": seed})

    assert len({spec.seed for spec in service.specs}) == 2


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": "a" * 32_001}, "prompt", "string_above_max_length"),
        ({"prompt": "a\ud800"}, "prompt", "invalid_value"),
        ({"width": 0}, "width", "invalid_value"),
        ({"width": 17}, "width", "invalid_value"),
        ({"height": 1000}, "height", "invalid_value"),
        ({"width": 100_000, "height": 8}, "width", "invalid_value"),
        ({"width": 2048, "height": 512}, "width", "invalid_value"),
        ({"width": 4096, "height": 4096}, "width", "invalid_value"),
        ({"size": "1000x1000"}, "size", "invalid_value"),
        ({"size": "512"}, "size", "invalid_value"),
        ({"size": 512}, "size", "invalid_type"),
        ({"size": "512x768", "width": 768, "height": 512}, "width", "invalid_value"),
        ({"size": "512x768", "width": 512}, "height", "missing_required_parameter"),
        ({"width": "512"}, "width", "invalid_type"),
        ({"width": 512.5}, "width", "invalid_type"),
        ({"width": True}, "width", "invalid_type"),
        ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 51}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 10**9}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": 4}, "guidance_scale", "unsupported_value"),
        ({"guidance_scale": "1"}, "guidance_scale", "invalid_type"),
        ({"seed": -2}, "seed", "invalid_value"),
        ({"seed": 2**53}, "seed", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_png_output_compression"),
        ({"steps": 4}, "steps", "unknown_parameter"),
        ({"n": 1}, "n", "unknown_parameter"),
    ],
    ids=str,
)
async def test_what_does_not_fit_is_refused_by_name(client, service, body, param, code):
    """400, the field, the code; the worker never hears of it."""
    complete = body if "prompt" in body or not body else {"prompt": "a", **body}
    response = await client.post(
        "/generate",
        content=json.dumps(complete),
        headers={"content-type": "application/json"},
    )

    assert response.status_code == 400
    assert (param, code) == (error_of(response)["param"], error_of(response)["code"])
    assert not service.tickets


async def test_a_limit_of_the_plan_names_a_field_of_this_route(client, service):
    """The service speaks of `size`, which this route does not have."""
    service.plan_pixels = (65_536,)
    response = await client.post("/generate", json={"prompt": "a"})

    assert error_of(response)["param"] == "width"


async def test_the_base_variant_honours_guidance(client, service):
    """50 steps and 4.0 by default, up to its card's limits."""
    service.model = find_spec("flux.2-klein-base-4b")
    await client.post("/generate", json={"prompt": "a"})
    await client.post(
        "/generate", json={"prompt": "a", "guidance_scale": 2.5, "num_inference_steps": 100}
    )
    above = await client.post("/generate", json={"prompt": "a", "guidance_scale": 21})

    assert [(spec.num_inference_steps, spec.guidance_scale) for spec in service.specs] == [
        (50, 4.0),
        (100, 2.5),
    ]
    assert error_of(above)["param"] == "guidance_scale"


async def test_the_deadline_header_reaches_the_service(client, service):
    """Which may shorten its limit by it."""
    headers = {"x-klein-deadline-s": "2.5"}
    await client.post("/generate", json={"prompt": "a"}, headers=headers)

    assert service.deadlines == [2.5]


@pytest.mark.parametrize("text", ["0", "-1", "0.01", "soon", "nan", "inf", ""])
async def test_a_deadline_that_is_none_is_refused(client, service, text):
    """It names the header."""
    headers = {"x-klein-deadline-s": text}
    response = await client.post("/generate", json={"prompt": "a"}, headers=headers)

    assert error_of(response)["param"] == "X-Klein-Deadline-S"
    assert not service.tickets


async def test_unknown_fields_can_be_ignored(serve, service):
    """`KLEIN_UNKNOWN_FIELDS=ignore` is for dialects."""
    client = await serve(unknown_fields="ignore")
    response = await client.post("/generate", json={"prompt": "a", "cfg_scale": 4})

    assert response.status_code == 200
