"""`GET /`: a page to try the model in, with its static files under `/static/`.

All files are in the package: no build step, no third party, no inline script. The page needs no
key, since it holds only the defaults of a published model; its API requests need one. The limits
that the form keeps come from `GET /health`. The files are read once and sent whole: a Range is
ignored. Comments, indentation and empty lines are not sent, nor what lies between two tags.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.deps import Running
from app.domain import ModelSpec
from app.errors import Kind, KleinError
from app.images.preparing import RATIO_TOLERANCE
from app.images.uploads import REFERENCE_PIXELS

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_PAGE = "playground.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_COMMENTS = re.compile(r"^ *(?://[^\n]*|/\*(?s:.*?)\*/)$", re.MULTILINE)
_ENDS = re.compile(r" +// .*$", re.MULTILINE)
"""Comments after a script's line; no text in the scripts holds one of these."""
_BETWEEN = re.compile(r"(?<=>)\n(?=<)")
_INDENTATION = re.compile(r"^ +", re.MULTILINE)
_EMPTY = re.compile(r"\n{2,}")
_GAPS = re.compile(r"(?<=[:;,{}])[ \n]+| +(?=[{}])")
"""In styles, where no selector has one of these before a gap that counts."""
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


def build_router() -> APIRouter:
    """Make the router; the files are read here, so a package without them does not start."""
    files = {
        path.name: (_lean(path), _TYPES[path.suffix])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _TYPES
    }
    page, page_type = files.pop(_PAGE)
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def playground(request: Request, runtime: Running) -> Response:
        body = page.replace(_MODEL, _MODEL.replace(b"null", _describe(runtime.service.model)))
        return _answer(request, body, page_type)

    @router.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        if name not in files:
            raise KleinError("The page has no such file; it starts at /.", kind=Kind.NOT_FOUND)
        return _answer(request, *files[name])

    return router


def _answer(request: Request, body: bytes, media_type: str) -> Response:
    """Return a file, or 304 if its ETag matches."""
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)


@cache
def _lean(path: Path) -> bytes:
    """Read a file without what browsers pass over."""
    text = _COMMENTS.sub("", path.read_text("utf-8"))
    bare = _EMPTY.sub("\n", _INDENTATION.sub("", text))
    if path.suffix == ".css":
        bare = _GAPS.sub("", bare).replace(";}", "}")
    elif path.suffix == ".js":
        bare = _ENDS.sub("", bare)
    elif path.suffix == ".html":
        bare = _BETWEEN.sub("", bare)
    return bare.encode()


def _describe(model: ModelSpec) -> bytes:
    """Return the model's names and defaults, and how uploads are read, as JSON for the page."""
    facts = {
        "id": model.id,
        "title": model.title,
        "note": model.note,
        "width": model.default_width,
        "height": model.default_height,
        "steps": model.default_steps,
        "reference_pixels": REFERENCE_PIXELS,
        "mask_tolerance": RATIO_TOLERANCE,
    }
    return json.dumps(facts).replace("<", "\\u003c").encode()
