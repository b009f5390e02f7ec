"""OpenAI's images API: `/v1/images/generations` and, the same, `/v1/images`."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import Client, DeadlineS, Service
from app.api.disconnect import unless_gone
from app.api.schemas import native, openai, openai_fields, openai_out
from app.api.schemas.body import read_json, require_json
from app.service import Picture


def build_router(config: ApiConfig) -> APIRouter:
    """Make the routes with their limits and habits."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/images", summary="The same as /v1/images/generations")
    @router.post("/v1/images/generations", summary="Make pictures of a prompt")
    async def generations(
        request: Request, service: Service, client: Client, deadline_s: DeadlineS
    ) -> Response:
        require_json(request)
        service.check_open()
        fields = openai_fields.table(service.card, config, is_edit=False)
        wish = openai.read(fields.read(await read_json(request)), service.card, config)
        size = wish.size or (service.card.default_width, service.card.default_height)
        ticket = service.submit(
            wish.specs(size, wish.draw_seed(service.random_seed)),
            client=client,
            output=wish.output,
            deadline_s=deadline_s,
        )
        pictures = await unless_gone(request.receive, ticket.pictures())
        body = await asyncio.to_thread(
            openai_out.answer,
            pictures,
            asked=wish,
            model=service.card.id,
            created=int(time.time()),
        )
        return Response(body, media_type="application/json", headers=_headers(pictures))

    return router


def _headers(pictures: list[Picture]) -> dict[str, str]:
    headers = {}
    if len(pictures) == 1:
        headers["Server-Timing"] = native.server_timing(pictures[0])
    if warnings := openai_out.all_warnings(pictures):
        headers["X-Klein-Warnings"] = "; ".join(warnings)
    return headers
