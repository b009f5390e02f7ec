"""An error as a page in words, for whoever has typed the address into a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse
from starlette.types import Scope

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    )
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem;"
    "color-scheme:light dark}code{font-family:ui-monospace,monospace}"
)
_NAME = re.compile(r"`([^`]*)`|\b(KLEIN_[A-Z_]+)\b")


def wants_page(scope: Scope) -> bool:
    """Whether a browser asks, for something to show to a person.

    Java's HttpURLConnection asks for HTML by default too, together with GIF.
    """
    accept = Headers(scope=scope).get("accept", "")
    return scope["method"] == "GET" and "text/html" in accept and "image/gif" not in accept


def page_of(message: str, status: int, headers: Mapping[str, str]) -> HTMLResponse:
    """Make the page; names of settings and what stands in backticks become code."""
    words = _NAME.sub(r"<code>\1\2</code>", escape(message, quote=False))
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>klein-server</title><style>{_STYLE}</style>"
        f"<h1>This is klein-server, but …</h1><p>{words}</p>",
        status_code=status,
        headers={**_HEADERS, **headers},
    )
