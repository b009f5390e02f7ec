"""`GET /docs` and `/openapi.json`: the API's reference, with examples that work when pasted.

The page is generated from the OpenAPI document, because the usual ones load scripts from a third
party: this one works offline and under our content security policy.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from app.api.config import ApiConfig
from app.api.deps import Running
from app.api.page import POLICY, mark_up
from app.service.service import ImageService

_STYLE = """\
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
body{color:#1b1b1b;background:#fff}code,pre{font-family:ui-monospace,monospace}
h2{border-top:1px solid #ccc;padding-top:1.5rem;margin-top:2.5rem}
pre{background:#f3f3f1;padding:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
td{border-bottom:1px solid #ddd;padding:.3rem .6rem .3rem 0;vertical-align:top}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}
pre{background:#242424}td,h2{border-color:#444}}
"""


def build_router(
    config: ApiConfig, describe: Callable[[ImageService], dict[str, Any]]
) -> APIRouter:
    """Make the router; *describe* returns the OpenAPI document for a service."""
    router = APIRouter(include_in_schema=False)
    reference = _Reference(describe)

    @router.get("/openapi.json")
    async def document(runtime: Running) -> Response:
        return Response((await reference.of(runtime.service)).json, media_type="application/json")

    @router.get("/docs")
    async def page(request: Request, runtime: Running) -> Response:
        found = await reference.of(runtime.service)
        return HTMLResponse(
            _page(found.document, config.own_url(request)),
            headers={"Content-Security-Policy": POLICY},
        )

    return router


@dataclass(frozen=True, slots=True)
class _Made:
    document: dict[str, Any]
    json: bytes


class _Reference:
    """The OpenAPI document of one service, made once, by a thread: it takes up to 0.1 s."""

    def __init__(self, describe: Callable[[ImageService], dict[str, Any]]) -> None:
        self._describe = describe
        self._service: ImageService | None = None
        self._making: asyncio.Task[_Made] | None = None

    async def of(self, service: ImageService) -> _Made:
        """Return it, made at the first request."""
        if self._making is None or self._service is not service:
            self._service = service
            self._making = asyncio.create_task(asyncio.to_thread(self._make, service))
        # A client that disconnects does not keep the others from it.
        return await asyncio.shield(self._making)

    def _make(self, service: ImageService) -> _Made:
        document = self._describe(service)
        return _Made(document, bytes(JSONResponse(document).body))


def _page(document: dict[str, Any], base: str) -> str:
    info = document["info"]
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width,initial-scale=1'>",
            f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>",
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            f"<p>{mark_up(info['description'])}</p>",
            "<p>Where keys are set, add <code>-H 'authorization: Bearer &lt;key&gt;'</code>. ",
            "The same as <a href=/openapi.json>OpenAPI</a>.</p>",
            *(
                _operation(base, path, method, operation)
                for path, methods in document["paths"].items()
                for method, operation in methods.items()
            ),
        ]
    )


def _operation(base: str, path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<h2><code>{method.upper()} {escape(path)}</code></h2>",
        f"<p>{mark_up(operation.get('summary', ''))}.</p>",
    ]
    contents = operation.get("requestBody", {}).get("content", {})
    for media_type, content in contents.items():
        command = _command(base + path, media_type, content["example"])
        parts.append(f"<pre>{escape(command)}</pre>{_fields(content['schema'])}")
    if not contents and (address := _address(path, operation)) is not None:
        asked = "" if method == "get" else f"-X {method.upper()} "
        parts.append(f"<pre>{escape(f'curl {asked}{shlex.quote(base + address)}')}</pre>")
    statuses = ", ".join(
        f"{status} {escape(reply['description'])}"
        for status, reply in operation["responses"].items()
    )
    return "\n".join([*parts, f"<p>Answers: {statuses}</p>"])


def _command(url: str, media_type: str, example: dict[str, Any]) -> str:
    output = " -o picture.png" if url.endswith("/generate") else ""
    if media_type == "multipart/form-data":
        form = " ".join(f"-F {shlex.quote(f'{name}={value}')}" for name, value in example.items())
        return f"curl {shlex.quote(url)} {form}"
    body = shlex.quote(json.dumps(example))
    return f"curl {shlex.quote(url)} -H 'content-type: {media_type}' -d {body}{output}"


def _address(path: str, operation: dict[str, Any]) -> str | None:
    """Fill the path's parameters with their examples; return None where one has none."""
    examples = {
        parameter["name"]: parameter.get("example")
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "path"
    }
    return None if None in examples.values() else path.format_map(examples)


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        limits = ", ".join(
            f"{word} {json.dumps(field[word])}"
            for word in ("enum", "minimum", "maximum", "multipleOf", "maxLength", "default")
            if word in field
        )
        about = mark_up(field.get("description", ""))
        rows.append(f"<tr><td><code>{escape(name)}</code><td>{about} {escape(limits)}")
    return f"<table>{''.join(rows)}</table>"
