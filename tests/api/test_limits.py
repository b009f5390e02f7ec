"""One rule set behind every door: each names it in its own fields, and `/health` hands it out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.domain import ImageSpec
from app.errors import InvalidRequest
from app.limits import Limits
from tests.api.apps import app_on
from tests.api.conftest import client_of, error_of
from tests.support.fakes import INFO
from tests.support.in_process import InProcess

SIZE = {"width": 1024, "height": 1024}


@pytest.mark.parametrize(
    ("route", "sent", "headers", "param", "start"),
    [
        ("/generate", SIZE, {}, "width", "1024x1024 is more"),
        ("/v1/images", {"size": "1024x1024"}, {}, "size", "1024x1024 is more"),
        ("/v1/images", SIZE, {}, "size", "1024x1024 is more"),
        ("/v1/images", {"n": 3}, {}, "n", "n is 3, but at most 2 images may wait"),
        ("/generate", {}, {"X-Klein-Deadline-S": "1"}, "X-Klein-Deadline-S", "The deadline of 1 s"),
        (
            "/v1/images",
            {"size": "256x256"},
            {"X-Klein-Deadline-S": "1"},
            "X-Klein-Deadline-S",
            "The deadline of 1 s",
        ),
    ],
)
async def test_each_dialect_names_its_own_fields(route, sent, headers, param, start) -> None:
    """What the service refuses comes out under the name that the client sent."""
    runtime = InProcess(capacity=2)
    runtime.worker.info = replace(INFO, max_pixels=(512 * 512,))
    spec = ImageSpec("x", 256, 256, 4, 1.0, 0)
    runtime.estimator.learn(spec, 5.0)
    small = {"width": 256, "height": 256} if route == "/generate" else {"size": "256x256"}
    body = {"prompt": "x", **(sent if "width" in sent else {**small, **sent})}
    async with client_of(app_on(runtime)) as client:
        error = error_of(await client.post(route, json=body, headers=headers))

    assert error["param"] == param
    assert str(error["message"]).startswith(start)


async def test_health_shows_the_limits(client, service) -> None:
    """Under the names that the page reads."""
    shown = (await client.get("/health")).json()["limits"]

    assert shown == {
        "min_side": 64,
        "max_side": 4096,
        "multiple": 16,
        "max_ratio": 3,
        "max_pixels": 4_194_304,
        "max_steps": 50,
        "min_guidance": 1,
        "max_guidance": 1,
        "max_references": 4,
        "max_seed": 2**53 - 1,
        "max_prompt_characters": 32_000,
        "max_loras": 4,
        "max_lora_scale": 2,
        "max_lora_rank": 128,
        "scaled": None,
    }
    assert Limits(**shown) == service.limits


def test_another_multiple_is_kept_everywhere(service) -> None:
    """Of a model whose sides go in steps of 32."""
    limits = Limits.of(replace(service.model, size_multiple=32), 4_194_304)

    assert limits.nearest(1000, 1000) == (992, 992)
    with pytest.raises(InvalidRequest, match="a multiple of 32 from 64"):
        limits.check_size(1008, 1024)


def test_the_operator_only_takes_away(service) -> None:
    """Fewer pixels and references than the model's, never more."""
    less = Limits.of(service.model, 2_000_000, 2)
    more = Limits.of(service.model, 16_000_000, 9)

    assert (less.max_pixels, less.max_references) == (2_000_000, 2)
    assert (more.max_pixels, more.max_references) == (4_194_304, 4)
