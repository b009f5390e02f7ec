"""Clients of OpenAI's API that are programs of their own, or come from registries that these tests
cannot reach: their requests byte for byte, and what each reads of the answers.

Bodies follow the clients' sources, heads come from the HTTP libraries that they use: aiohttp (Open
WebUI), openai-node and axios (LibreChat, LobeChat, n8n), node-fetch (SillyTavern), openai-python
(Home Assistant), the JDK's (LangChain4j), Go's (openai-go). openai-java's are written as OkHttp
writes them. All others of docs/clients.md run themselves, in `test_packages.py`.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import pytest
import pytest_asyncio
from PIL import Image

from app.domain import ImageSpec
from tests.api.apps import app_on
from tests.api.sockets import served
from tests.support.fakes import FakeRuntime
from tests.support.recorded import exchange, recorded, without

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "house-key-1234"
PROMPT = "A red circle on a blue background"


@dataclass(frozen=True)
class Case:
    """A request, and what its client reads: so many pictures of that size, as base64 or links."""

    name: str
    size: tuple[int, int]
    count: int = 1
    kind: str = "b64_json"
    references: int = 0


CASES = (
    Case("open-webui-1-generate", (512, 512)),
    Case("open-webui-2-edit", (64, 64), references=1),
    Case("open-webui-3-edit-two", (64, 64), references=2),
    Case("librechat-1-generate", (1024, 1024)),
    Case("librechat-2-edit", (64, 64), references=2),
    Case("lobechat-1-generate", (1024, 1024)),
    Case("lobechat-2-edit", (64, 64), references=1),
    Case("n8n-1-generate", (1024, 1024)),
    Case("n8n-2-edit", (1024, 1024), references=1),
    Case("home-assistant-2-generate", (1024, 1024), kind="url"),
    Case("sillytavern-1-generate", (1024, 1024)),
    Case("langchain4j-1-generate", (1024, 1024)),
    Case("openai-go-1-generate", (512, 512), count=2),
    Case("openai-go-2-edit", (64, 64), references=2),
    Case("openai-java-1-generate", (512, 512)),
    Case("openai-java-2-edit", (64, 64), references=1),
)
ALL = [pytest.param(case, id=case.name) for case in CASES]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running():
    """A server with a key: its port, and the service behind it."""
    runtime = FakeRuntime()
    async with served(app_on(runtime, api_keys=(KEY,))) as port:
        yield port, runtime.service


@pytest.fixture
def port(running):
    """Where that server listens."""
    return running[0]


@pytest.fixture
def service(running):
    """Its service, which has been asked for nothing yet."""
    running[1].tickets.clear()
    return running[1]


async def fetched(port: int, link: str) -> bytes:
    """Follow a link without a key; it leads to the address that the client has asked."""
    path = link.removeprefix("http://127.0.0.1:8000")
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n"
    answer = await exchange(port, head.encode())
    assert answer.headers["content-type"] == "image/png"
    return answer.body


def made_of(spec: ImageSpec) -> tuple[str, int]:
    """What these clients choose of a picture besides its size."""
    return spec.prompt, len(spec.references)


@pytest.mark.parametrize("case", ALL)
async def test_the_client_gets_its_pictures(port, service, case):
    """So many as it asked for, in the form that it reads, and a `url` only where it wants one."""
    answer = await exchange(port, recorded(case.name, "openai"))
    assert answer.status == 200, answer.body
    items = answer.json()["data"]
    assert len(items) == case.count
    for item in items:
        assert ("url" in item) == (case.kind == "url")
        if case.kind == "url":
            data = await fetched(port, item["url"])
        else:
            data = base64.b64decode(item["b64_json"], validate=True)
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size) == ("PNG", case.size)

    assert [made_of(spec) for spec in service.specs] == [(PROMPT, case.references)] * case.count


@pytest.mark.parametrize("name", ["openai-go-1-generate", "openai-java-1-generate"])
async def test_a_field_of_our_own_reaches_us(port, service, name):
    """`seed`, which neither SDK knows, through the means that both have for such fields."""
    answer = await exchange(port, recorded(name, "openai"))

    assert answer.json()["data"][0]["seed"] == service.specs[0].seed == 5


async def test_home_assistant_checks_its_key_by_the_list_of_models(port):
    """At its start, and gives up after ten seconds."""
    answer = await exchange(port, recorded("home-assistant-1-models", "openai"))

    assert [each["id"] for each in answer.json()["data"]] == ["flux.2-klein-4b"]


@pytest.mark.parametrize("case", ALL)
async def test_without_the_key_nothing_is_made(port, service, case):
    """401, with the reason where OpenAI puts it."""
    answer = await exchange(port, without(recorded(case.name, "openai"), "authorization"))

    assert answer.status == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not service.specs
