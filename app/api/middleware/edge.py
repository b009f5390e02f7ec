"""The outermost middleware: the request id, the response's common headers, one access log line.

No `BaseHTTPMiddleware`: behind one, a route does not learn that its client has disconnected
(https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/utils.py, `with_cancellation`).
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.deps import runtime_of
from app.api.errors import REPLIES, error_response, internal_error
from app.api.middleware.cors import Origins
from app.errors import Cancelled, Kind, KleinError
from app.log_writer import ACCESS
from app.logs import clip
from app.request_context import Outcome, RequestContext, current_request

if TYPE_CHECKING:
    from app.telemetry.tracing import Traces

_access = logging.getLogger(ACCESS)
_log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
    ),
}


class Edge:
    """ASGI middleware, outermost: sets request id and headers, counts and logs the outcome."""

    def __init__(self, app: ASGIApp, *, origins: Origins, traces: Traces | None = None) -> None:
        self._app = app
        self._origins = origins
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; whatever happens, it is answered, counted and logged once."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(_adopt(Headers(scope=scope).get("x-request-id")))
        if self._traces is not None:
            context.trace = self._traces.current()
        current_request.set(context)
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                _complete(headers, context.id, time.perf_counter() - started)
                self._origins.mark(scope, headers)
            elif context.trace and not message.get("more_body", False):
                # Now: the span ends with the last bytes.
                context.trace.settle(_outcome(context, status))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            _log.exception("A request failed in a way that nothing expected.")
            context.error = internal_error()
            if status == 0:
                await error_response(context.error, scope)(scope, receive, send_with_headers)
        except BaseException:
            context.error = Cancelled()
            raise
        finally:
            if context.trace:
                context.trace.settle(_outcome(context, status))
            _record(scope, context, status, time.perf_counter() - started)


def _adopt(asked: str | None) -> str:
    return asked if asked and _ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"


def _complete(headers: MutableHeaders, identity: str, seconds: float) -> None:
    headers["x-request-id"] = identity
    headers["openai-processing-ms"] = str(round(seconds * 1000))
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)


def _record(scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
    """Count the request and log it; neither holds the prompt or the key."""
    route = getattr(scope.get("route"), "path", "unmatched")
    outcome = _outcome(context, status).name
    reason = REPLIES[context.error.kind].reason if context.error else None
    if runtime := runtime_of(scope):
        runtime.metrics.request_finished(route, outcome, seconds)
        if reason is not None:
            runtime.metrics.request_rejected(reason)
    if context.error is not None and context.error.kind is Kind.CANCELLED:
        status = REPLIES[Kind.CANCELLED].status
    _access.info(
        "%s %s was answered.",
        scope["method"],
        route,
        extra={
            "status": status,
            "outcome": outcome,
            "seconds": round(seconds, 4),
            **_details(scope, context.error),
            **context.notes,
            **({"loras": ",".join(context.loras)} if context.loras else {}),
        },
    )


def _details(scope: Scope, error: KleinError | None) -> dict[str, object]:
    """Return why it was refused, which many clients do not show, and the retry count."""
    details: dict[str, object] = {}
    if error is not None:
        details = {
            "code": error.code or REPLIES[error.kind].code,
            "param": error.param and clip(error.param),
            "reason": _without(
                error.param, "<param>", _without(error.word, "<word>", error.message)
            ),
        }
    retries = Headers(scope=scope).get("x-stainless-retry-count", "")
    if retries.isdecimal() and len(retries) < 4 and retries != "0":
        details["retry"] = int(retries)
    return details


def _without(text: str | None, instead: str, message: str) -> str:
    """Remove *text* from *message*: also a parameter's name may be the caller's own."""
    if not text:
        return message
    return re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", instead, message)


def _outcome(context: RequestContext, status: int) -> Outcome:
    if context.outcome is not None:
        return Outcome(context.outcome)
    if context.error is not None:
        reply = REPLIES[context.error.kind]
        return Outcome(reply.outcome, reply.code if reply.status >= 500 else None)
    return Outcome("ok" if status < 400 else "error")
