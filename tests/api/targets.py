"""What the SDK's cases are run against: an app on fakes in this process, or a live service."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI
from PIL import Image

KEY = "acceptance-key-1234"


@dataclass
class Target:
    """One service and the clients that speak to it.

    *quick* are the fields that make a picture cheap without touching what a case is about.
    """

    url: str
    http: httpx.AsyncClient
    count_accepted: Callable[[], int]
    is_live: bool
    quick: dict[str, Any] = field(default_factory=dict)

    def client(self, **options: Any) -> AsyncOpenAI:
        """Make the SDK's client."""
        options = {"api_key": KEY, "max_retries": 0, **options}
        return AsyncOpenAI(base_url=self.url + "/v1", http_client=self.http, **options)

    @property
    def c(self) -> AsyncOpenAI:
        """The contract's `c`."""
        return self.client()

    @property
    def s(self) -> AsyncOpenAI:
        """The contract's `s`, which checks every answer against the SDK's types."""
        return self.client(_strict_response_validation=True)

    def extra(self, **fields: Any) -> dict[str, Any]:
        """Make an `extra_body`."""
        return {**self.quick, **fields}


def picture(item: Any) -> Image.Image:
    """Decode one item of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json, validate=True)))
