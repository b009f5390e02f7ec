"""`/docs` and `/openapi.json`: written by the tables that check the requests."""

from __future__ import annotations

import html
import re
import shlex

import pytest

from app.engine.catalog import card


async def test_every_route_is_described(client):
    """And nothing that is not there: the list is the whole surface of the service."""
    paths = (await client.get("/openapi.json")).json()["paths"]

    assert set(paths) == {
        "/generate",
        "/v1/images",
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{id}",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
    }


async def test_every_example_works_when_pasted(client, service):
    """The commands on the page are sent as they stand there."""
    page = (await client.get("/docs")).text
    commands = [
        shlex.split(html.unescape(each))
        for each in re.findall(r"<pre>(curl .*?)</pre>", page, re.S)
    ]
    posts = [words for words in commands if "-d" in words]

    assert len(commands) >= 9
    assert posts
    for words in commands:
        url = words[1].replace("{id}", "flux.2-klein-4b")
        if "-d" in words:
            name, _, value = words[words.index("-H") + 1].partition(": ")
            body = words[words.index("-d") + 1]
            response = await client.post(url, content=body, headers={name: value})
        else:
            response = await client.get(url)

        assert response.status_code == 200, words


async def test_the_page_needs_no_third_party(client):
    """No script, nothing fetched, and a policy that says so."""
    response = await client.get("/docs")

    assert "<script" not in response.text
    assert "https://" not in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'")


async def test_limits_are_those_of_the_served_model(client, service):
    """The document is made for the model that answers."""
    service.card = card("shapes")
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    width = body["schema"]["properties"]["width"]

    assert (width["default"], width["maximum"]) == (256, 512)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_the_page_can_be_switched_off(serve, path):
    """`KLEIN_DOCS=false`."""
    client = await serve(docs=False)

    assert (await client.get(path)).status_code == 404
