"""`GET /metrics`: the Prometheus exposition; `app.telemetry.metrics` defines its content."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from app.api.deps import Running

router = APIRouter(tags=["health"])


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(runtime: Running) -> Response:
    """Answer a scrape."""
    body, content_type = runtime.metrics.exposition()
    return Response(body, headers={"content-type": content_type})
