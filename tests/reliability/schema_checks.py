"""What every answer to schemathesis must hold besides its schema; loaded by test_fuzz.py."""

from __future__ import annotations

import re

import schemathesis

_DEADLINE = "X-Klein-Deadline-S"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/=]{400,}")
_LEAK = re.compile(r"\b0x[0-9a-f]{6,}|/home|/usr|/root|site-packages|Traceback|\.py\b|/dev/shm")


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Give each request time enough: a deadline that cannot be kept is rightly answered with
    503.
    """
    text = str((case.headers or {}).get(_DEADLINE, ""))
    if _NUMBER.fullmatch(text) and float(text) >= 0.1:
        case.headers[_DEADLINE] = str(float(text) + 60)


@schemathesis.check
def leaks_nothing(ctx, response, case) -> None:
    """No address, path or traceback reaches a caller, whatever he sends."""
    if "image/" in response.headers.get("content-type", [""])[0]:
        return
    # A picture in base64 may spell anything.
    found = _LEAK.search(_BASE64.sub("", response.text)[:100_000])

    assert found is None, f"the answer shows {found.group(0)!r}"


@schemathesis.check
def errors_are_one_object(ctx, response, case) -> None:
    """With four keys, and an id, on every route."""
    assert response.headers["x-request-id"]
    if response.status_code < 400:
        return
    error = response.json()["error"]

    assert set(error) == {"message", "type", "param", "code"}
    assert "application/json" in response.headers["content-type"][0]
