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
_PROGRAMS = ("image/gif", "application/json")
"""What no browser names beside HTML."""
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem;"
    "color-scheme:light dark}code{font-family:ui-monospace,monospace}"
)
_KEYS = (
    "<p>Whoever runs the service has set its keys, as <code>KLEIN_API_KEYS</code> or "
    "<code>KLEIN_API_KEYS_FILE</code>: ask them for one.</p>"
)
_OWNER = (
    "<p>That is a setting of the service, to be made on the machine that it runs on; "
    "<code>docs/network.md</code> has the steps. If someone else runs it, show them this page.</p>"
)
_SETTING = "KLEIN_"
_NAME = re.compile(rf"`([^`]*)`|\b({_SETTING}[A-Z_]+)\b")


def wants_page(scope: Scope) -> bool:
    """Whether a browser asks, for something to show to a person.

    It does so too when it sends a form. Java's HttpURLConnection asks for HTML by default, together
    with GIF; no browser asks for JSON.
    """
    accept = Headers(scope=scope).get("accept", "")
    return "text/html" in accept and not any(each in accept for each in _PROGRAMS)


def mark_up(text: str) -> str:
    """Write *text* as HTML; names of settings and what stands in backticks become code."""
    return _NAME.sub(r"<code>\1\2</code>", escape(text, quote=False))


def _advice(message: str, needs_key: bool) -> str:
    if needs_key:
        return _KEYS + _KEY_FORM
    return _OWNER if _SETTING in message else ""


def page_of(message: str, status: int, headers: Mapping[str, str]) -> HTMLResponse:
    """Make the page of an error."""
    needs_key = status == 401
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>klein-server</title><style>{_STYLE}</style>"
        f"<h1>This is klein-server, but …</h1><p>{mark_up(message)}</p>"
        f"{_advice(message, needs_key)}",
        status_code=status,
        headers={
            "Content-Security-Policy": _KEY_POLICY if needs_key else POLICY,
            "Cache-Control": "no-store",
            "Vary": "Accept",
            **headers,
        },
    )
