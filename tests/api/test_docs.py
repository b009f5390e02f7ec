"""`/docs` and `/openapi.json`: written by the tables that check the requests."""

from __future__ import annotations

import asyncio
import html
import re
import shlex
import threading

import pytest

from app.api.app import TRACED
from app.api.openai.stream_key import PATTERN
from app.api.system import openapi
from app.engine.models.registry import find_spec
from tests.api.sockets import until


async def test_every_route_is_described(client):
    """And nothing that is not there: the list is the whole surface of the service."""
    paths = (await client.get("/openapi.json")).json()["paths"]

    assert set(paths) == {
        "/generate",
        "/v1/images",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/images/files/{name}",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/tokens",
        "/v1/jobs",
        "/v1/jobs/{id}",
        "/v1/loras",
        "/v1/loras/{name}",
        "/v1/loras/{name}/preview",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/sleep",
        "/wake",
        "/wake_up",
        "/is_sleeping",
    }


async def test_the_document_is_made_once(client, monkeypatch):
    """By a thread, since it takes as long as a hundred other requests; whoever leaves meanwhile
    keeps nobody from it."""
    describe, made_by = openapi.describe, []
    may_go_on = threading.Event()

    def slowly(*words):
        made_by.append(threading.get_ident())
        assert may_go_on.wait(10)
        return describe(*words)

    monkeypatch.setattr(openapi, "describe", slowly)
    leaving = asyncio.create_task(client.get("/openapi.json"))
    await until(lambda: made_by)
    assert (await client.get("/health/live")).status_code == 200
    leaving.cancel()
    others = [asyncio.create_task(client.get(path)) for path in ("/openapi.json", "/docs")]
    await asyncio.sleep(0)
    may_go_on.set()

    assert [(await other).status_code for other in others] == [200, 200]
    assert (await client.get("/openapi.json")).status_code == 200
    assert len(made_by) == 1
    assert made_by[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("path", "media_type", "absent"),
    [
        ("/generate", "application/json", {"type": "null"}),
        ("/v1/images/generations", "application/json", {"type": "null"}),
        ("/v1/images/edits", "application/json", {"type": "null"}),
        ("/v1/images/edits", "multipart/form-data", {"const": ""}),
        ("/v1/tokens", "application/json", {"type": "null"}),
    ],
)
async def test_of_other_names_only_what_counts_as_absent_is_described(
    client, path, media_type, absent
):
    """As it is read: null in JSON and nothing in a form pass under any name, all else does not."""
    operation = (await client.get("/openapi.json")).json()["paths"][path]["post"]
    schema = operation["requestBody"]["content"][media_type]["schema"]

    assert schema["additionalProperties"] == absent


async def test_every_example_works_when_pasted(client, service):
    """The commands on the page are sent as they stand there."""
    page = (await client.get("/docs")).text
    commands = [
        shlex.split(html.unescape(each))
        for each in re.findall(r"<pre>(curl .*?)</pre>", page, re.S)
    ]
    picture = (await client.post("/generate", json={"prompt": "a"})).content

    assert len(commands) == 18
    for words in commands:
        response = await run(client, words, picture)

        assert response.status_code == 200, words


async def run(client, words, picture):
    """Send what curl would send; the picture is the one that an earlier example has written."""
    if words[1] == "-X":
        return await client.request(words[2], words[3])
    url, *options = words[1:]
    values = dict(zip(options[::2], options[1::2], strict=True))
    form = [
        each.partition("=")
        for flag, each in zip(options[::2], options[1::2], strict=True)
        if flag == "-F"
    ]
    if form:
        files = [
            (name, (None, text) if not text.startswith("@") else (text[1:], picture))
            for name, _, text in form
        ]
        return await client.post(url, files=files)
    if "-d" in values:
        name, _, value = values["-H"].partition(": ")
        return await client.post(url, content=values["-d"], headers={name: value})
    return await client.get(url)


async def test_the_page_needs_no_third_party(client):
    """No script, nothing fetched, and a policy that says so."""
    response = await client.get("/docs")

    assert "<script" not in response.text
    assert "https://" not in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'")


async def test_backticks_are_rendered(client):
    """What stands in them is code; none is left."""
    page = (await client.get("/docs")).text

    assert "`" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    assert "<code>POST /generate</code> answers with" in page
    assert "instead of <code>size</code>" in page


@pytest.mark.parametrize(("mask", "says_white"), [("auto", True), ("alpha", False)])
async def test_masks_are_described_as_they_are_read(serve, mask, says_white):
    """`KLEIN_MASK`, on each route that takes one."""
    paths = (await (await serve(mask=mask)).get("/openapi.json")).json()["paths"]
    found = [
        content["schema"]["properties"]["mask"].get("description")
        for path in ("/generate", "/v1/images/edits")
        for content in paths[path]["post"]["requestBody"]["content"].values()
    ]

    assert len(found) == 3
    assert [("white" in each) for each in found] == [says_white] * 3


async def test_the_key_of_a_stream_is_described(client):
    """Where streams are, with what is allowed."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    told = {
        path: [PATTERN in each["description"] for each in methods["post"]["parameters"]]
        for path, methods in paths.items()
        if "post" in methods and path in TRACED
    }

    assert told == {
        "/generate": [False],
        "/v1/images": [False, True],
        "/v1/images/generations": [False, True],
        "/v1/images/edits": [False, True],
    }


async def test_limits_are_those_of_the_served_model(client, service):
    """The document is made for the model that answers."""
    service.model = find_spec("shapes")
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    width = body["schema"]["properties"]["width"]

    assert (width["default"], width["maximum"]) == (256, 512)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_the_page_can_be_switched_off(serve, path):
    """`KLEIN_DOCS=false`."""
    client = await serve(docs=False)

    assert (await client.get(path)).status_code == 404
