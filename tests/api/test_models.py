"""`GET /v1/models`: what is served, under which names."""

from __future__ import annotations

import logging

import pytest

from app.errors import Kind
from tests.api.conftest import error_of

MODEL = {
    "id": "flux.2-klein-4b",
    "object": "model",
    "created": 1_768_435_200,
    "owned_by": "black-forest-labs",
}


@pytest.mark.parametrize("state", [None, Kind.LOADING, Kind.DRAINING, Kind.WORKER_DOWN])
async def test_the_list_never_waits_for_the_model(client, service, state):
    """Nextcloud takes an empty list for no model, Home Assistant waits ten seconds."""
    service.closed_by = state
    response = await client.get("/v1/models")

    assert response.json() == {"object": "list", "data": [MODEL]}


@pytest.mark.parametrize(
    "name",
    [
        "flux.2-klein-4b",
        "black-forest-labs/FLUX.2-klein-4B",
        "black-forest-labs%2FFLUX.2-klein-4B",
        "gpt-image-1",
        "dall-e-3",
    ],
)
async def test_a_model_answers_to_every_name_it_has(client, name):
    """`id` is the name that was asked for; the SDK sends the slash as %2F."""
    response = await client.get(f"/v1/models/{name}")

    assert response.status_code == 200
    assert response.json() == {**MODEL, "id": name.replace("%2F", "/")}


@pytest.mark.parametrize("name", ["nope", "flux.2-klein-9b", "../etc/passwd", "%2e%2e%2fx"])
async def test_another_name_is_not_found(client, name):
    """404 with the code that the SDK knows."""
    response = await client.get(f"/v1/models/{name}")

    assert response.status_code == 404
    assert error_of(response)["code"] in {"model_not_found", "unknown_url"}


async def test_the_error_names_the_model_that_was_asked_for(client):
    """And the one that is served; cut and printable, whatever was asked for."""
    name = "no-such-model\x1b[31m" + "x" * 1000
    asked = await client.get("/v1/models/no-such-model")
    posted = await client.post("/v1/images/generations", json={"prompt": "a", "model": name[:900]})

    assert "`no-such-model` is not served" in str(error_of(asked)["message"])
    assert "`no-such-model?[31mxxx" in str(error_of(posted)["message"])
    for response in (asked, posted):
        message = str(error_of(response)["message"])
        assert "`flux.2-klein-4b`" in message
        assert len(message) < 200


async def test_aliases_are_listed_on_request(serve):
    """`KLEIN_LIST_ALIASES=true`, for n8n's picker."""
    client = await serve(list_aliases=True)
    names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]

    assert names[0] == "flux.2-klein-4b"
    assert {"gpt-image-1", "dall-e-3"} <= set(names)


async def test_switched_off_aliases_are_unknown(serve):
    """`KLEIN_MODEL_ALIASES=false`."""
    client = await serve(model_aliases=False, list_aliases=True)

    assert (await client.get("/v1/models/gpt-image-1")).status_code == 404
    assert len((await client.get("/v1/models")).json()["data"]) == 1


async def test_the_name_that_was_asked_for_is_in_no_log_line(client, caplog):
    """It may be anything: a prompt in the wrong field."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    await client.get("/v1/models/canary")
    await client.post("/v1/images/generations", json={"prompt": "a", "model": "canary" * 20})
    reasons = [record.reason for record in caplog.records]

    assert ["<word>" in each for each in reasons] == [True, True]
    assert "canary" not in "".join(str(vars(record)) for record in caplog.records)
