"""Sleep and wake: `POST /sleep`, `POST /wake` or `/wake_up`, `GET /is_sleeping`, as vLLM has them.

Whoever may ask for a picture may ask for either. Nothing that runs or waits is lost by them: a
worker sleeps once it has nothing to do, and the next request wakes it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api.deps import Running
from app.api.schema.body import JSON, read_json, require_media_type
from app.errors import InvalidRequest
from app.request_context import current_request
from app.runtime import Runtime
from app.worker.rest import Cause

_LEVELS = ("1", "2")
"""vLLM's: both mean the same here, that the worker's process ends."""
_SAID = {
    "ready": "The model is ready on the card.",
    "asleep": "The worker sleeps and the card is free; the next request wakes it.",
    "waking": "The worker is waking.",
}

router = APIRouter(tags=["sleep"])


@router.post("/sleep", summary="Free the card once nothing runs or waits")
async def sleep(request: Request, runtime: Running) -> Response:
    """Have every worker end as soon as what was accepted is finished; the next request wakes it."""
    await _read_level(request)
    runtime.workers.sleep(Cause.ASKED)
    return _answer(runtime, wants_sleep=True)


@router.post("/wake", summary="Load the model again")
async def wake(request: Request, runtime: Running) -> Response:
    """Have every worker that sleeps start, one that has left its card to another program too."""
    runtime.workers.wake(Cause.ASKED)
    return _answer(runtime)


router.add_api_route(
    "/wake_up", wake, methods=["POST"], summary="The same by vLLM's name", name="wake_up"
)


@router.get("/is_sleeping", summary="Whether the workers sleep")
async def is_sleeping(runtime: Running) -> Response:
    """Say it."""
    return _answer(runtime)


async def _read_level(request: Request) -> None:
    """Read `level` from the query or a JSON body, where there is one.

    Raises:
        InvalidRequest: it is none that vLLM knows.
    """
    level: object = request.query_params.get("level", "1")
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        require_media_type(request, JSON)
        level = (await read_json(request)).get("level", level)
    if str(level) not in _LEVELS or isinstance(level, bool):
        raise InvalidRequest(
            "level must be 1 or 2, which mean the same here: the worker ends and the card is free.",
            param="level",
        )


def _answer(runtime: Runtime, *, wants_sleep: bool = False) -> Response:
    """Say what the workers are at, and that they will sleep where that was asked for."""
    current_request.get().outcome = "ok"
    status = runtime.service.status()
    sleeps = status.state in ("asleep", "yielding")
    body: dict[str, Any] = {"is_sleeping": sleeps, "state": status.state}
    if wants_sleep and not sleeps:
        body["message"] = "The worker sleeps as soon as what was accepted is finished."
    else:
        body["message"] = _SAID.get(status.state, status.reason)
    return JSONResponse(body)
