"""What the SDK's cases are run against: an app on fakes in this process, or a live service."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI
from PIL import Image

from tests.api.apps import app_on
from tests.support.fakes import FakeRuntime
from tests.support.server import Server

BASE_URL = "http://127.0.0.1:8000"
KEY = "acceptance-key-1234"
LIFETIME_S = 1.2
MAX_BODY = 4 * 1024 * 1024


@dataclass
class Target:
    """One service and the clients that speak to it.

    *quick* are the fields that make a picture cheap without touching what a test is about.
    """

    url: str
    http: httpx.AsyncClient
    count_accepted: Callable[[], int]
    paints: bool
    """Whether a model makes the pictures, so that a mask can be seen in them."""
    quick: dict[str, Any] = field(default_factory=dict)

    def client(self, **options: Any) -> AsyncOpenAI:
        """Make the SDK's client."""
        options = {"api_key": KEY, "max_retries": 0, **options}
        return AsyncOpenAI(base_url=self.url + "/v1", http_client=self.http, **options)

    @property
    def c(self) -> AsyncOpenAI:
        """The SDK's client, as an application makes it."""
        return self.client()

    @property
    def s(self) -> AsyncOpenAI:
        """The SDK's client that checks every answer against the SDK's types."""
        return self.client(_strict_response_validation=True)

    def extra(self, **fields: Any) -> dict[str, Any]:
        """Make an `extra_body`."""
        return {**self.quick, **fields}


@asynccontextmanager
async def on_fakes() -> AsyncIterator[Target]:
    """Run an app on fakes in this process."""
    runtime = FakeRuntime()
    app = app_on(runtime, max_body_bytes=MAX_BODY, link_lifetime_s=LIFETIME_S)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as http:
        yield Target(BASE_URL, http, lambda: len(runtime.service.specs), paints=False)


@asynccontextmanager
async def on_server(
    server: Server, *, paints: bool = False, quick: dict[str, Any] | None = None
) -> AsyncIterator[Target]:
    """Speak to a live service over its socket."""

    def count() -> int:
        modes = ("generate", "edit")
        return int(sum(server.metric("klein_images_total", mode=mode) for mode in modes))

    async with httpx.AsyncClient(timeout=120) as http:
        yield Target(server.url, http, count, paints=paints, quick=quick or {})


def picture(item: Any) -> Image.Image:
    """Decode one item of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json, validate=True)))
