"""What both APIs share is read in the same way: the same fields make the same spec."""

from __future__ import annotations

import pytest

from tests.api.conftest import error_of

ROUTES = ("/generate", "/v1/images/generations")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 512, "height": 768},
        {"num_inference_steps": 2, "seed": 7},
        {"guidance_scale": 1.0, "output_format": "webp", "output_compression": 40},
        {"seed": 2**53 - 1, "output_format": "jpeg"},
    ],
    ids=str,
)
async def test_equal_fields_make_equal_pictures(client, service, fields):
    """Prompt, size, steps, guidance, seed and file."""
    service.random_seed = lambda: 5
    for route in ROUTES:
        response = await client.post(route, json={"prompt": "a", **fields})
        assert response.status_code == 200

    native, images = service.specs
    assert native == images
    assert service.tickets[0].output == service.tickets[1].output


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": " "},
        {"prompt": None},
        {"width": 100, "height": 100},
        {"width": 4096, "height": 64},
        {"num_inference_steps": 0},
        {"guidance_scale": 3},
        {"seed": -2},
        {"output_format": "png", "output_compression": 50},
        {"output_compression": 101},
    ],
    ids=str,
)
async def test_equal_faults_are_refused_in_equal_words(client, service, fields):
    """Sentence, field and code."""
    first, second = [
        error_of(await client.post(route, json={"prompt": "a", **fields})) for route in ROUTES
    ]

    assert first == second
    assert not service.tickets
