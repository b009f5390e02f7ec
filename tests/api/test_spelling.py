"""Spellings of an address that clients send: slashes too many, `/v1` too few, HEAD for GET."""

from __future__ import annotations

import logging

import pytest

from tests.api.conftest import error_of

KEY = "first-key-1234"
PICTURE = {"prompt": "a"}
POSTS = ("/generate", "/v1/images", "/v1/images/generations")


def spellings(path: str) -> list[str]:
    """With a slash at the end, and with doubled ones."""
    return [f"{path}/", f"{path}//", f"/{path}", path.replace("/", "//"), f"//{path}//"]


@pytest.mark.parametrize("route", POSTS)
async def test_slashes_too_many_are_the_same_route(client, service, runtime, route):
    """A base URL that ends with one is joined so; the answer is the picture, never a redirect,
    which would lose the body."""
    for number, path in enumerate(spellings(route), 1):
        response = await client.post(f"http://127.0.0.1:8000{path}", json=PICTURE)

        assert response.status_code == 200
        assert len(service.tickets) == number
    assert set(runtime.metrics.finished) == {(route, "ok")}


async def test_the_list_of_models_may_end_with_a_slash(client):
    """It is no model without a name."""
    listed = (await client.get("/v1/models")).json()
    for path in spellings("/v1/models"):
        assert (await client.get(f"http://127.0.0.1:8000{path}")).json() == listed


@pytest.mark.parametrize("path", ["/health/live/", "//health//ready", "/metrics/", "//", "/docs/"])
async def test_reading_is_spelled_as_freely(client, path):
    """Also the page itself."""
    response = await client.get(f"http://127.0.0.1:8000{path}")

    assert response.status_code == 200
    assert "location" not in response.headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//v1//models/", 401),
        ("/v1/images/files/", 401),
        ("//docs", 401),
        ("/health/", 401),
        ("/health/live/", 200),
        ("//", 200),
        ("//static//playground.js", 200),
        ("/metrics//", 200),
    ],
)
async def test_keys_are_asked_for_by_the_route_that_answers(serve, path, status):
    """The spelling is settled before the key is: one path is judged and served."""
    client = await serve(api_keys=(KEY,))

    assert (await client.get(f"http://127.0.0.1:8000{path}")).status_code == status


async def test_a_closed_scrape_stays_closed_in_every_spelling(serve):
    """`KLEIN_METRICS_KEY=required`."""
    client = await serve(api_keys=(KEY,), metrics_key="required")
    for path in spellings("/metrics"):
        assert (await client.get(f"http://127.0.0.1:8000{path}")).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/images/generations",
        "/images/edits/",
        "/images",
        "/models",
        "/models/gpt-image-1",
        "/v1/v1/images/generations",
        "/v1/v1/models",
        "/openai/v1/images/edits",
        "/api/models",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_wrong_base_url_is_told_the_right_one(client, path, method):
    """404 with what to put into the client's settings."""
    response = await client.request(method, path, json=PICTURE)
    error = error_of(response)

    assert (response.status_code, error["code"]) == (404, "unknown_url")
    assert "base URL http://127.0.0.1:8000/v1" in str(error["message"])


@pytest.mark.parametrize("path", ["/v1/embeddings", "/nope", "/modelsx", "/v1", "/imagesx"])
async def test_another_address_that_is_not_there_says_just_that(client, path):
    """Its base URL may be right."""
    message = str(error_of(await client.get(path))["message"])

    assert "no such address" in message
    assert "base URL" not in message


async def test_the_name_in_it_is_in_no_log_line(serve, caplog):
    """It is the caller's own word, and `*` admits any."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    client = await serve(allowed_hosts=("*",))
    response = await client.get("/models", headers={"host": "canary.example"})

    assert "base URL http://canary.example/v1" in str(error_of(response)["message"])
    assert "canary" not in "".join(str(vars(record)) for record in caplog.records)


async def test_the_right_base_url_is_the_public_one(serve):
    """As links begin."""
    client = await serve(public_url="https://pictures.example/a")
    message = error_of(await client.get("/models"))["message"]

    assert "https://pictures.example/a/v1" in str(message)


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/gpt-image-1",
        "/docs",
        "/openapi.json",
        "/",
        "/static/playground.js",
    ],
)
async def test_head_is_answered_wherever_get_is(client, runtime, path):
    """With the same status and headers."""
    got, asked = await client.get(path), await client.head(path)
    own = {"x-request-id", "openai-processing-ms"}

    assert asked.status_code == got.status_code == 200
    assert {k: v for k, v in asked.headers.items() if k not in own} == {
        k: v for k, v in got.headers.items() if k not in own
    }
    assert runtime.metrics.finished[-1] == runtime.metrics.finished[-2]


async def test_head_of_a_link_tells_its_size(client):
    """Clients ask so before they fetch; a link that is gone is 404."""
    made = await client.post(POSTS[1], json={**PICTURE, "response_format": "url"})
    url = made.json()["data"][0]["url"]
    asked, got = await client.head(url), await client.get(url)

    assert asked.status_code == 200
    assert asked.headers["content-type"] == "image/png"
    assert int(asked.headers["content-length"]) == len(got.content)
    assert (await client.head(url + "x")).status_code == 404


async def test_what_is_only_posted_has_no_head(client):
    """405; where GET is possible, HEAD is named beside it."""
    asked, posted = await client.head("/generate"), await client.post("/v1/models")

    assert (asked.status_code, asked.headers["allow"]) == (405, "POST")
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
