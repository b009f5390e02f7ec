"""`POST /generate`: one image, its bytes as the response, everything else in headers."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import DEADLINE, Running, admit
from app.api.disconnect import await_images, unless_disconnected
from app.api.errors import own_names
from app.api.native.request import GenerateRequest, read, table
from app.api.native.response import response_headers
from app.api.pieces import Body, Data, PieceResponse
from app.api.schema.body import read_json
from app.domain import ImageSpec
from app.request_context import current_request
from app.runtime import Runtime
from app.service.ticket import Admission

_OWN_NAMES = {"references": "images", "deadline_s": DEADLINE}


def build_router(config: ApiConfig) -> APIRouter:
    """Make the router."""
    router = APIRouter(tags=["native"])

    @router.post("/generate", summary="Make one picture, answered as its bytes")
    async def generate(request: Request, runtime: Running) -> Response:
        context = current_request.get()
        with admit(request, runtime.service, "application/json") as admission:
            asked, specs = await _read(request, runtime, admission, config)
            context.release_body()
            with own_names({**_OWN_NAMES, **asked.names}):
                ticket = admission.submit(specs, asked.image.output)
        (picture,) = await await_images(ticket, request.receive)
        return PieceResponse(
            Body(Data(picture.data)),
            media_type=picture.media_type,
            headers=response_headers(picture, context.id),
        )

    return router


async def _read(
    request: Request, runtime: Runtime, admission: Admission, config: ApiConfig
) -> tuple[GenerateRequest, list[ImageSpec]]:
    """Read and decode the body; uploads are released before the image is queued."""
    model, limits, edit = runtime.service.model, runtime.service.limits, None
    fields = table(model, limits, config)
    values = fields.read(await read_json(request, has_pictures=True))
    asked = read(values, model, limits, runtime.service.adapters)
    if asked.images:
        admission.reserve(1)
        mask = asked.mask and replace(asked.mask, repaints=config.repaints)
        with own_names(asked.names):
            work = runtime.decoders.prepare(
                asked.images, mask, asked.image.size, limits.nearest, client=admission.client
            )
            edit = await unless_disconnected(request.receive, work, limit_s=admission.seconds_left)
        admission.warnings = edit.warnings
        asked = replace(asked, images=(), mask=None)
    return asked, asked.image.specs(runtime.service, edit)
