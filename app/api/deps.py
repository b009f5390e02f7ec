"""What the routes take from the app and ask of the service. The only reader of `app.state.runtime`.

Under `httpx.ASGITransport` the state that a lifespan yields never reaches `request.state`, but what
it sets on `app.state` does; hence that one attribute.
"""

from __future__ import annotations

import math
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from app.api.middleware.body_limit import is_large
from app.api.schema.body import require_media_type
from app.errors import InvalidRequest
from app.request_context import current_request
from app.runtime import Runtime
from app.service.service import ImageService
from app.service.ticket import Admission

MIN_DEADLINE_S = 0.1
DEADLINE = "X-Klein-Deadline-S"


def runtime_of(scope: Scope) -> Runtime | None:
    """Return the runtime that the lifespan built; None outside of the lifespan."""
    runtime: Runtime | None = getattr(scope["app"].state, "runtime", None)
    return runtime


async def _runtime(request: Request) -> Runtime:
    runtime = runtime_of(request.scope)
    if runtime is None:
        raise RuntimeError("A request came outside of the lifespan.")
    return runtime


Running = Annotated[Runtime, Depends(_runtime)]


def admit(request: Request, service: ImageService, *media_types: str) -> Admission:
    """Have *service* admit a request whose body is of one of *media_types*.

    Raises:
        InvalidRequest: the header of its deadline is not valid.
        KleinError: the body is of another type, or the service takes no request now.
    """
    deadline_s = _deadline_s(request)
    require_media_type(request, *media_types)
    return service.admit(
        client=current_request.get().client,
        deadline_s=deadline_s,
        is_large=is_large(request.scope),
    )


def _deadline_s(request: Request) -> float | None:
    """Read the client's deadline in seconds; it can only shorten the service's own limit."""
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
