"""FastAPI dependencies of the routes. The only reader of `app.state.runtime`.

Under `httpx.ASGITransport` the state that a lifespan yields never reaches `request.state`, but what
it sets on `app.state` does; hence that one attribute.
"""

from __future__ import annotations

import math
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from app.api.middleware.body_limit import is_large
from app.api.request_context import context_of
from app.errors import InvalidRequest
from app.images.pool import DecoderPool
from app.runtime import Runtime
from app.service.service import ImageService
from app.telemetry.metrics import Metrics

MIN_DEADLINE_S = 0.1
DEADLINE = "X-Klein-Deadline-S"


def runtime_of(scope: Scope) -> Runtime | None:
    """Return the runtime that the lifespan built; None outside of the lifespan."""
    runtime: Runtime | None = getattr(scope["app"].state, "runtime", None)
    return runtime


def metrics_of(scope: Scope) -> Metrics | None:
    """Return the metrics, for the edge middleware; None outside of the lifespan."""
    runtime = runtime_of(scope)
    return None if runtime is None else runtime.metrics


def decoders_of(request: Request) -> DecoderPool:
    """Return the pool of image decoders."""
    return _runtime(request).decoders


async def _service(request: Request) -> ImageService:
    return _runtime(request).service


async def _metrics(request: Request) -> Metrics:
    return _runtime(request).metrics


async def _client(request: Request) -> str:
    return context_of(request.scope).client


async def _deadline_s(request: Request) -> float | None:
    """Read the client's deadline in seconds; it can only shorten the service's own limit.

    Raises:
        InvalidRequest: the header is no finite number from `MIN_DEADLINE_S`.
    """
    text = request.headers.get(DEADLINE)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_DEADLINE_S <= seconds < math.inf:
        raise InvalidRequest(
            f"{DEADLINE} must be a number of seconds from {MIN_DEADLINE_S:g}, such as 30.",
            param=DEADLINE,
        )
    return seconds


async def _is_large(request: Request) -> bool:
    return is_large(request.scope)


def _runtime(request: Request) -> Runtime:
    runtime = runtime_of(request.scope)
    if runtime is None:
        raise RuntimeError("A request came outside of the lifespan.")
    return runtime


Service = Annotated[ImageService, Depends(_service)]
Telemetry = Annotated[Metrics, Depends(_metrics)]
Client = Annotated[str, Depends(_client)]
DeadlineS = Annotated[float | None, Depends(_deadline_s)]
IsLarge = Annotated[bool, Depends(_is_large)]
