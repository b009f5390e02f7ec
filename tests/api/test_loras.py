"""`/v1/loras` and what else says which adapters there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from app.domain import Lora
from app.engine.adapters.directory import Adapter, Listing, RefusedFile
from app.service.adapters import Adapters
from tests.api.conftest import error_of

INK = Adapter("ink", "ab" * 32, 92_000_000, 32, 1_700_000_000, False, "/secret/ink.safetensors")
OIL = Adapter("oil", "cd" * 32, 46_000_000, 16, 1_700_000_001, True, "/secret/oil.safetensors")
FUSED = Lora("grain", 0.5, "ef" * 32, "/secret/grain.safetensors", 8)


@pytest.fixture(autouse=True)
def adapters(service) -> Adapters:
    """Two are listed, one of which is always on; a third is missing."""
    service.adapters = Adapters([("ink", 0.8), ("gone", 1.0)], 64, (FUSED,))
    service.adapters.replace(Listing((INK, OIL), (RefusedFile("x/b.pt", "b.pt may run code."),)))
    return service.adapters


async def test_they_are_listed(client) -> None:
    """With the scale of pictures that name none, and no path."""
    response = await client.get("/v1/loras")

    ink, oil = response.json()["data"]
    assert response.json()["object"] == "list"
    assert ink == {
        "id": "ink",
        "object": "lora",
        "parent": "flux.2-klein-4b",
        "rank": 32,
        "size_bytes": 92_000_000,
        "sha256": "ab" * 32,
        "created": 1_700_000_000,
        "scale": 0.8,
        "preview": None,
    }
    assert (oil["scale"], oil["preview"]) == (None, "/v1/loras/oil/preview")
    assert "secret" not in response.text
    assert (await client.get("/v1/loras/ink")).json() == ink


@pytest.mark.parametrize("path", ["/v1/loras/inc", "/v1/loras/inc/preview"])
async def test_an_unknown_one_is_not_found(client, path) -> None:
    """The error has names like it."""
    response = await client.get(path)
    error = error_of(response)

    assert response.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "name")
    assert error["message"] == "There is no adapter `inc`; names like it are `ink`."


@pytest.mark.parametrize("name", ["..%2Fink", "%2e%2e%2fetc%2fpasswd", "ink%00", "x" * 1000])
async def test_a_name_is_no_path(client, name) -> None:
    """It is looked up, and nothing else."""
    response = await client.get(f"/v1/loras/{name}/preview")

    assert response.status_code == 404
    assert len(str(error_of(response)["message"])) < 200


async def test_each_is_a_model_with_a_parent(client) -> None:
    """As LLM servers list them; after the model itself."""
    models = (await client.get("/v1/models")).json()["data"]

    assert [each["id"] for each in models] == ["flux.2-klein-4b", "ink", "oil"]
    assert models[1] == {
        "id": "ink",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "local",
        "parent": "flux.2-klein-4b",
    }
    assert (await client.get("/v1/models/ink")).json() == models[1]
    assert (await client.get("/v1/models/inc")).status_code == 404


async def test_a_preview_is_shown(client, adapters, tmp_path) -> None:
    """Small, whatever lies beside the file; 404 where nothing does."""
    adapters.replace(Listing((replace(OIL, path=str(tmp_path / "oil.safetensors")),)))
    missing = await client.get("/v1/loras/oil/preview")
    Image.new("RGB", (640, 640), "red").save(tmp_path / "oil.png")
    shown = await client.get("/v1/loras/oil/preview")

    assert (missing.status_code, error_of(missing)["code"]) == (404, "preview_not_found")
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/webp")
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.content[8:12] == b"WEBP"


async def test_health_has_the_recipe(client) -> None:
    """What pictures are made with, and what was asked for in vain; no shapes of layers."""
    body = (await client.get("/health")).json()

    assert body["loras"] == {
        "listed": 2,
        "refused": 1,
        "max_rank": 64,
        "default": [{"name": "ink", "scale": 0.8, "sha256": "ab" * 32}],
        "fused": [{"name": "grain", "scale": 0.5, "sha256": "ef" * 32}],
        "problems": [
            "KLEIN_LORAS names gone, but no such adapter is listed; images are made without it."
        ],
    }
    assert "linear_shapes" not in body["worker"]


async def test_the_document_describes_them(client) -> None:
    """Each field that is answered, and no other."""
    document = (await client.get("/openapi.json")).json()
    answers = document["paths"]["/v1/loras/{name}"]["get"]["responses"]
    schema = answers["200"]["content"]["application/json"]["schema"]

    assert {"200", "401", "404", "500"} == set(answers)
    assert schema["properties"].keys() == (await client.get("/v1/loras/ink")).json().keys()
