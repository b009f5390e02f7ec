"""The mapping of errors to responses: one table of status codes, and OpenAI's envelope.

A dialect may bring an envelope of its own, for the paths below its prefix.
Nothing outside of `app.api` knows an HTTP status. A message is passed on as it is, because
`app.errors` promises that it is written for the caller; any other exception is logged and answered
with a fixed sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from app.api.config import ApiConfig
from app.api.page import page_of, wants_page
from app.errors import Cancelled, InvalidRequest, Kind, KleinError
from app.request_context import current_request

_INVALID = "invalid_request_error"
_UNAVAILABLE = "service_unavailable_error"
_SERVER = "server_error"

DEFAULT_RETRY_AFTER_S = 5
MAX_RETRY_AFTER_S = 60  # openai-python gives up on more than 120 s, the AI SDK on 60 s or more

_ELSEWHERE = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (
            "/openai/deployments/.*",
            "Azure's addresses are not served, since there is one model and no deployment to "
            "choose; use a client of OpenAI itself with the base URL {base}/v1.",
        ),
        (
            "(/v1)?/images/variations",
            "Variations are not made, since the model needs a prompt; send the picture with one to "
            "{base}/v1/images/edits.",
        ),
        (
            "(/v1)?/responses(/.*)?",
            "The Responses API is not served, since there is no language model here; ask for "
            "pictures at {base}/v1/images/generations.",
        ),
        (
            "(/[^/]+){0,2}/(models(/.+)?|images(/generations|/edits)?)",
            "There is no such address here; give the client the base URL {base}/v1 and nothing "
            "behind it.",
        ),
    )
)
"""Paths that clients ask for and that no route knows, with what to say; *base* is our own URL."""
_ADVICE = {
    # openai-python would silently run the job twice more.
    500: {"x-should-retry": "false"},
    504: {"x-should-retry": "false"},
}
"""Headers by status, besides those that `_advice` makes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The response to one kind of error, and the labels under which it is counted."""

    status: int
    type: str
    code: str
    outcome: str
    reason: str | None = None
    """For rejected requests: the label of `klein_requests_rejected_total`."""


REPLIES: Mapping[Kind, Reply] = {
    Kind.INVALID: Reply(400, _INVALID, "invalid_value", "invalid"),
    Kind.UNAUTHORIZED: Reply(401, _INVALID, "invalid_api_key", "unauthorized"),
    Kind.ORIGIN: Reply(403, _INVALID, "origin_not_allowed", "unauthorized"),
    Kind.NOT_FOUND: Reply(404, _INVALID, "unknown_url", "invalid"),
    Kind.METHOD_NOT_ALLOWED: Reply(405, _INVALID, "method_not_allowed", "invalid"),
    Kind.TOO_LARGE: Reply(413, _INVALID, "request_too_large", "invalid"),
    Kind.UNSUPPORTED_MEDIA: Reply(415, _INVALID, "unsupported_media_type", "invalid"),
    Kind.UNSUPPORTED_ENCODING: Reply(415, _INVALID, "unsupported_media_type", "invalid"),
    Kind.RATE_LIMITED: Reply(
        429, "rate_limit_error", "rate_limit_exceeded", "rejected", "rate_limit"
    ),
    Kind.QUEUE_FULL: Reply(503, _UNAVAILABLE, "server_is_overloaded", "rejected", "queue_full"),
    Kind.LOADING: Reply(503, _UNAVAILABLE, "model_loading", "rejected", "loading"),
    Kind.DRAINING: Reply(503, _UNAVAILABLE, "shutting_down", "rejected", "draining"),
    Kind.WORKER_DOWN: Reply(503, _UNAVAILABLE, "model_loading", "rejected", "worker_down"),
    Kind.CANCELLED: Reply(499, _INVALID, "client_closed_request", "cancelled"),
    Kind.DEADLINE: Reply(504, _SERVER, "deadline_exceeded", "deadline"),
    Kind.OUT_OF_MEMORY: Reply(500, _SERVER, "out_of_memory", "oom"),
    Kind.FAILED: Reply(500, _SERVER, "generation_failed", "error"),
    Kind.FATAL: Reply(500, _SERVER, "generation_failed", "error"),
    Kind.INTERNAL: Reply(500, _SERVER, "internal_error", "error"),
    Kind.STARTUP: Reply(500, _SERVER, "internal_error", "error"),
}


def envelope(error: KleinError) -> dict[str, dict[str, str | None]]:
    """Write *error* as OpenAI's error object, always with its four keys."""
    reply = REPLIES[error.kind]
    return {
        "error": {
            "message": error.message,
            "type": reply.type,
            "param": error.param,
            "code": error.code or reply.code,
        }
    }


@dataclass(frozen=True, slots=True)
class Shape:
    """How errors are written to requests whose path begins with *prefix*."""

    prefix: str
    envelope: Callable[[KleinError], Mapping[str, object]]
    challenge: str
    """The value of `WWW-Authenticate`."""


_OPENAI = Shape("", envelope, "Bearer")


def error_response(
    error: KleinError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """Make the response to *error*; its headers say whether and when to retry."""
    shape = _shape_of(scope)
    return JSONResponse(
        shape.envelope(error),
        status_code=REPLIES[error.kind].status,
        headers={**(headers or {}), **_advice(error, shape)},
    )


def _shape_of(scope: Scope) -> Shape:
    shapes: tuple[Shape, ...] = scope["app"].state.error_shapes
    return next((each for each in shapes if scope["path"].startswith(each.prefix)), _OPENAI)


def refusal(scope: Scope, error: KleinError) -> Response:
    """Make the response to a request that no route sees: a page in words where a browser asks."""
    if wants_page(scope):
        return page_of(error.message, REPLIES[error.kind].status, _advice(error, _shape_of(scope)))
    return error_response(error, scope)


def retry_after(seconds: int | None) -> str:
    """Clamp a Retry-After in seconds to the range that every known client honours."""
    wanted = DEFAULT_RETRY_AFTER_S if seconds is None else seconds
    return str(max(1, min(MAX_RETRY_AFTER_S, wanted)))


@contextmanager
def own_names(names: Mapping[str, str]) -> Iterator[None]:
    """Let an error of the service name a route's own fields, by *names*, instead of a spec's."""
    try:
        yield
    except InvalidRequest as error:
        error.rename(names)
        raise


def internal_error() -> KleinError:
    """Replace an unexpected exception: nothing of it reaches the caller."""
    return KleinError("The service failed to answer; tell its operator the request id.")


def install(app: FastAPI, config: ApiConfig, *shapes: Shape) -> None:
    """Install the exception handlers: errors have the envelope of *shapes*, all others OpenAI's."""
    app.state.error_shapes = shapes

    async def on_error(request: Request, raised: Exception) -> Response:
        error = _as_ours(request, raised)
        current_request.get().keep(error)
        if error.kind is Kind.NOT_FOUND and isinstance(raised, HTTPException):
            error = _unrouted(request, config) or error  # in no log line: it has the caller's word
        headers = getattr(raised, "headers", None) or {}
        if error.kind is Kind.METHOD_NOT_ALLOWED:
            # The middleware `Target` makes HEAD a GET.
            headers = {"Allow": headers.get("Allow", "GET").replace("GET", "GET, HEAD")}
        return error_response(error, request.scope, headers)

    for kind in (KleinError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, on_error)


def _unrouted(request: Request, config: ApiConfig) -> KleinError | None:
    for pattern, sentence in _ELSEWHERE:
        if pattern.fullmatch(request.scope["path"]):
            return KleinError(sentence.format(base=config.own_url(request)), kind=Kind.NOT_FOUND)
    return None


def _as_ours(request: Request, raised: Exception) -> KleinError:
    if isinstance(raised, KleinError):
        return raised
    if isinstance(raised, ClientDisconnect):
        return Cancelled()
    status = raised.status_code if isinstance(raised, HTTPException) else 400
    if status == 404:
        return KleinError(
            "There is no such address here; see /docs for those that exist.", kind=Kind.NOT_FOUND
        )
    if status == 405:
        return KleinError(
            f"{request.method} is not possible here; the Allow header names what is.",
            kind=Kind.METHOD_NOT_ALLOWED,
        )
    if status < 500:
        return InvalidRequest("The request does not fit; see /docs for what it may hold.")
    return internal_error()


def _advice(error: KleinError, shape: Shape) -> dict[str, str]:
    if error.kind is Kind.UNSUPPORTED_ENCODING:
        return {"Accept-Encoding": "identity"}  # no other 415 may have it (RFC 9110 12.5.3)
    status = REPLIES[error.kind].status
    if status == 401:
        return {"WWW-Authenticate": shape.challenge}
    if status in {429, 503}:
        return {"Retry-After": retry_after(error.retry_after_s)}
    return _ADVICE.get(status, {})
