"""What happens to every request, as plain ASGI classes: id, headers, host, body limit, one line in
the log.

No `BaseHTTPMiddleware`: behind one, a route no longer learns that its client has gone
(https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/utils.py, `with_cancellation`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.deps import metrics_of
from app.api.errors import REPLIES, error_response, internal_error
from app.api.exchange import Exchange, exchange_of, open_exchange
from app.errors import Cancelled, InvalidRequest, Kind, KleinError, Unavailable
from app.logs import request_id, request_notes

_access = logging.getLogger("app.api.access")
_log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::\d{1,5})?")

_BODIES_AT_ONCE = 8
"""How many of the largest bodies may be held at a time, whatever their number."""

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
    ),
}


class Edge:
    """ASGI, outermost: gives the request its id, the answer its headers, and counts what became of
    it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; whatever happens, it is answered, counted and logged once."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_adopt(Headers(scope=scope).get("x-request-id")))
        open_exchange(scope, exchange)
        request_id.set(exchange.id)
        request_notes.set({})
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _complete(MutableHeaders(scope=message), exchange.id, time.perf_counter() - started)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            _log.exception("A request failed in a way that nothing expected.")
            exchange.error = internal_error()
            if status == 0:
                await error_response(exchange.error)(scope, receive, send_with_headers)
        except BaseException:
            exchange.error = Cancelled()
            raise
        finally:
            _record(scope, exchange, status, time.perf_counter() - started)


class HostGate:
    """ASGI: answers only under a known name, so that no web page reaches the card by DNS rebinding.

    A request that carries a configured key may use any name. A name with a syntax error is refused
    always.
    """

    def __init__(self, app: ASGIApp, *, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400, or pass the request on."""
        if scope["type"] != "http" or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = InvalidRequest(
            "The service is not known under this Host; add it to KLEIN_ALLOWED_HOSTS."
        )
        exchange_of(scope).error = error
        await error_response(error)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        match = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".")
        return (
            # A link must work for whoever got it, under the name that a key made good; its own
            # name cannot be guessed, so a web page gains nothing by it.
            scope["path"].startswith("/v1/images/files/")
            or exchange_of(scope).has_key
            or "*" in self._names
            or name in self._names
            or _is_loopback(name)
        )


class BodyLimit:
    """ASGI: ends the reading of a body that is too large, by what it says or by what has come, and
    of one that takes too long.

    Only a reader meets the limits: a route that refuses for another reason never waits for the
    body. All bodies together are limited too, or a few dozen callers could fill the memory.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, limit_s: float) -> None:
        self._app = app
        self._held_bytes = 0
        self._max_bytes = max_bytes
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a body that cannot exceed the limit."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        expected = _content_length(scope)
        received = held = 0
        late_at: float | None = asyncio.get_running_loop().time() + self._limit_s

        async def receive_some() -> Message:
            nonlocal received, held, late_at
            self._check(expected)
            try:
                async with asyncio.timeout_at(late_at):
                    message = await receive()
            except TimeoutError:
                raise InvalidRequest(
                    f"The body took longer than {self._limit_s:g} s to arrive; send it faster, "
                    "or send less."
                ) from None
            if not message.get("more_body", False):
                late_at = None  # from here on it is the client's going that is waited for
            size_bytes = len(message.get("body", b""))
            received += size_bytes
            held += size_bytes
            self._held_bytes += size_bytes
            self._check(received)
            self._check_together()
            return message

        def let_go() -> None:
            nonlocal held
            self._held_bytes -= held
            held = 0

        exchange_of(scope).let_go = let_go
        try:
            await self._app(scope, receive_some, send)
        finally:
            let_go()

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise KleinError(
                f"The body is larger than {self._max_bytes:,} bytes; send less or smaller images.",
                kind=Kind.TOO_LARGE,
            )

    def _check_together(self) -> None:
        if self._held_bytes > _BODIES_AT_ONCE * self._max_bytes:
            raise Unavailable(
                "Too many large requests are being read; try again in a few seconds.",
                kind=Kind.QUEUE_FULL,
                retry_after_s=5,
            )


def _adopt(asked: str | None) -> str:
    return asked if asked and _ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"


def _complete(headers: MutableHeaders, identity: str, seconds: float) -> None:
    headers["x-request-id"] = identity
    headers["openai-processing-ms"] = str(round(seconds * 1000))
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)


def _record(scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
    """Count the request and write its line; neither knows what was asked, or with which key."""
    route = getattr(scope.get("route"), "path", "unmatched")
    outcome = exchange.outcome or _outcome(exchange.error, status)
    reason = REPLIES[exchange.error.kind].reason if exchange.error else None
    metrics = metrics_of(scope)
    if metrics is not None:
        metrics.request_finished(route, outcome, seconds)
        if reason is not None:
            metrics.request_rejected(reason)
    if exchange.error is not None and exchange.error.kind is Kind.CANCELLED:
        status = REPLIES[Kind.CANCELLED].status
    _access.info(
        "%s %s was answered.",
        scope["method"],
        route,
        extra={
            "status": status,
            "outcome": outcome,
            "seconds": round(seconds, 4),
            **_details(scope, exchange.error),
            **(request_notes.get() or {}),
        },
    )


def _details(scope: Scope, error: KleinError | None) -> dict[str, object]:
    """Add why it was refused, which many clients do not show, and whether it is a retry."""
    details: dict[str, object] = {}
    if error is not None:
        details = {
            "code": error.code or REPLIES[error.kind].code,
            "param": error.param,
            "reason": error.message,
        }
    retries = Headers(scope=scope).get("x-stainless-retry-count", "")
    if retries.isdecimal() and len(retries) < 4 and retries != "0":
        details["retry"] = int(retries)
    return details


def _outcome(error: KleinError | None, status: int) -> str:
    if error is not None:
        return REPLIES[error.kind].outcome
    return "ok" if status < 400 else "error"


def _content_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
