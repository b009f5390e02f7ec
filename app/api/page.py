"""An error as a page in words, for whoever has typed the address into a browser.

The page of a 401 asks for the key. Its script is part of it, so that it works at any address, and
the policy lets no other run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse
from starlette.types import Scope

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""The content security policy of a page without scripts."""

_SCRIPT = (Path(__file__).parent / "static" / "key.js").read_text("utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_KEY_POLICY = (
    f"{POLICY}; script-src 'sha256-{_DIGEST}'; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'"
)
_KEY_FORM = (
    "<form><label>API key <input type=password autocomplete=off required autofocus></label> "
    f"<button>Show</button> <output></output></form><script>{_SCRIPT}</script>"
)
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


def mark_up(text: str) -> str:
    """Write *text* as HTML; names of settings and what stands in backticks become code."""
    return _NAME.sub(r"<code>\1\2</code>", escape(text, quote=False))


def page_of(message: str, status: int, headers: Mapping[str, str]) -> HTMLResponse:
    """Make the page of an error."""
    needs_key = status == 401
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>klein-server</title><style>{_STYLE}</style>"
        f"<h1>This is klein-server, but …</h1><p>{mark_up(message)}</p>"
        f"{_KEY_FORM if needs_key else ''}",
        status_code=status,
        headers={
            "Content-Security-Policy": _KEY_POLICY if needs_key else POLICY,
            "Cache-Control": "no-store",
            "Vary": "Accept",
            **headers,
        },
    )
