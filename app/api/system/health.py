"""Health and metrics; a service that loads its model is alive, and not ready.

None of them waits for anything. A service that is not ready answers 503 with both OpenAI's error
object and the state, so that clients of either find theirs.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app import __version__
from app.api.deps import Running
from app.api.errors import envelope, retry_after
from app.domain import Status, WorkerStage, WorkerStatus
from app.errors import Kind, KleinError
from app.images.formats import OUTPUT_FORMATS
from app.request_context import current_request
from app.service.adapters import Adapters
from app.service.results import describe_loras

router = APIRouter(tags=["health"])


@router.get("/health/live", summary="Whether the process answers")
async def live(request: Request, runtime: Running) -> Response:
    """Say that the process answers.

    It says nothing of the model, unless the service has given up and is ending.
    """
    status = runtime.service.status()
    if status.stage == WorkerStage.FAILED:
        return _answer(request, status, {"status": "failed"})
    return JSONResponse({"status": "alive"})


@router.get("/health/ready", summary="Whether a picture could be made now")
async def ready(request: Request, runtime: Running) -> Response:
    """Say whether the model has made its warm-up picture and the service takes requests."""
    status = runtime.service.status()
    return _answer(request, status, _readiness(status))


@router.get("/health", summary="Model, precision, memory plan, queue")
async def health(request: Request, runtime: Running) -> Response:
    """Say all that is known; the status code is that of `/health/ready`."""
    status = runtime.service.status()
    details = {
        **_readiness(status),
        "version": __version__,
        "model": runtime.service.model.id,
        "queue": {
            "size": status.queue_size,
            "capacity": status.queue_capacity,
            "running": status.running,
            "estimated_wait_s": round(status.estimated_wait_s, 3),
        },
        "limits": asdict(runtime.service.limits),
        "loras": _loras(runtime.service.adapters),
        "worker_restarts": status.worker_restarts,
        "devices": [_device(each) for each in status.workers],
        "output_formats": list(OUTPUT_FORMATS),
    }
    if status.info is not None:
        details["worker"] = status.info.facts
    return _answer(request, status, details)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request, runtime: Running) -> Response:
    """Answer a scrape."""
    accept = request.headers.get("accept", "")
    scrape = runtime.metrics.scrape()
    body, content_type = await asyncio.to_thread(scrape.exposition, accept)
    return Response(body, headers={"content-type": content_type})


def _loras(adapters: Adapters) -> dict[str, Any]:
    """Say which adapters pictures are made with, and what prevents it."""
    return {
        "listed": len(adapters.listed()),
        "refused": len(adapters.refused),
        "max_rank": adapters.max_rank,
        "default": describe_loras(adapters.default),
        "fused": describe_loras(adapters.fused),
        "problems": list(adapters.problems),
    }


def _device(worker: WorkerStatus) -> dict[str, Any]:
    """Say what one worker is at, and what it has loaded that may differ from the others."""
    info = worker.info
    return {
        "name": worker.device.name,
        "uuid": worker.device.uuid,
        "ready": worker.is_ready,
        "stage": worker.stage,
        "progress": worker.progress,
        "reason": worker.reason,
        "left_out": worker.is_left_out,
        "yielding": worker.is_yielding,
        "restarts": worker.restarts,
        "precision": info and info.precision,
        "attention": info and info.attention,
        "plan": info and info.plan,
        "max_pixels": info and info.max_pixels,
    }


def _readiness(status: Status) -> dict[str, Any]:
    return {
        "ready": status.is_ready,
        "state": status.state,
        "stage": status.stage,
        "progress": status.progress,
        "reason": status.reason,
    }


def _answer(request: Request, status: Status, body: dict[str, Any]) -> Response:
    current_request.get().outcome = "ok"  # a health request succeeds, whatever the state
    if status.is_ready:
        return JSONResponse(body)
    error = KleinError(status.reason or "The service is not ready.", kind=_kind(status))
    headers = {"Retry-After": retry_after(round(status.estimated_wait_s))}
    return JSONResponse({**body, **envelope(error)}, 503, headers=headers)


def _kind(status: Status) -> Kind:
    if status.stage == WorkerStage.DRAINING:
        return Kind.DRAINING
    is_loading = (
        status.info is None and status.stage != WorkerStage.FAILED and status.state != "yielding"
    )
    return Kind.LOADING if is_loading else Kind.WORKER_DOWN
