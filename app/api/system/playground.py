"""`GET /`: a page to try the model in, with its static files under `/static/`.

All files are in the package: no build step, no third party, no inline script. The page needs no
key, since it holds only the limits of a published model; its API requests need one. The files are
read once and sent whole: a Range is ignored.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import Running
from app.domain import ModelSpec
from app.errors import Kind, KleinError

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_PAGE = "playground.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_MODEL = b'<script type="application/json" id="model">null</script>'
_HEADERS = {
    # Revalidated each time: a new version of the service never runs with an old script.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One static file and its media type."""

    body: bytes
    media_type: str

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 if its ETag matches."""
        tag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def build_router(config: ApiConfig) -> APIRouter:
    """Make the router; the files are read here, so a package without them does not start."""
    files = {
        path.name: StaticFile(path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    }
    page = files.pop(_PAGE)
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def playground(request: Request, runtime: Running) -> Response:
        body = page.body.replace(
            _MODEL, _MODEL.replace(b"null", _describe(runtime.service.model, config))
        )
        return StaticFile(body, page.media_type).answer(request)

    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        if name not in files:
            raise KleinError("The page has no such file; it starts at /.", kind=Kind.NOT_FOUND)
        return files[name].answer(request)

    return router


def _describe(model: ModelSpec, config: ApiConfig) -> bytes:
    """Return the model's names, defaults and limits for the page, as JSON."""
    facts = {
        "id": model.id,
        "title": model.title,
        "note": model.note,
        "width": model.default_width,
        "height": model.default_height,
        "steps": model.default_steps,
        "max_steps": model.max_steps,
        "min_side": model.min_side,
        "max_side": model.max_side,
        "max_pixels": min(model.max_pixels, config.max_pixels),
        "max_references": min(model.max_references, config.max_references),
    }
    return json.dumps(facts).replace("<", "\\u003c").encode()
