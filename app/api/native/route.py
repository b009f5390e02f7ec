"""`POST /generate`: one image, its bytes as the response, everything else in headers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import DEADLINE, Client, DeadlineS, IsLarge, Service, decoders_of
from app.api.disconnect import await_images, unless_gone
from app.api.errors import own_names
from app.api.native.request import name_sides, read, table
from app.api.native.response import response_headers
from app.api.pieces import Body, Data, PieceResponse
from app.api.request_context import context_of
from app.api.schema.body import read_json, require_json
from app.domain import ImageSpec
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.limits import Limits
from app.service.service import ImageService
from app.service.ticket import Admission

_OWN_NAMES = {"references": "images", "deadline_s": DEADLINE}


def build_router(config: ApiConfig) -> APIRouter:
    """Make the router with the limits of *config*."""
    router = APIRouter(tags=["native"])

    @router.post("/generate", summary="Make one picture, answered as its bytes")
    async def generate(
        request: Request,
        service: Service,
        client: Client,
        deadline_s: DeadlineS,
        is_large: IsLarge,
    ) -> Response:
        require_json(request)
        try:
            with service.admit(
                client=client, deadline_s=deadline_s, is_large=is_large
            ) as admission:
                spec, output = await _read(request, service, admission, config)
                context_of(request.scope).release_body()
                with own_names(_OWN_NAMES):
                    ticket = admission.submit([spec], output)
        except InvalidRequest as error:
            raise name_sides(error) from None
        (picture,) = await await_images(ticket, request.receive)
        headers = response_headers(picture, context_of(request.scope).id)
        return PieceResponse(
            Body(Data(picture.data)), media_type=picture.media_type, headers=headers
        )

    return router


async def _read(
    request: Request, service: ImageService, admission: Admission, config: ApiConfig
) -> tuple[ImageSpec, OutputFormat]:
    """Read and decode the body; uploads are released before the image is queued."""
    model = service.model
    fields = table(model, config)
    asked = read(fields.read(await read_json(request, has_pictures=True)), model, config)
    edit = None
    if asked.images:
        admission.reserve(1)
        limits = Limits.of(model, config.max_pixels)
        work = decoders_of(request).prepare(
            asked.images, asked.mask, asked.size, limits.nearest, client=admission.client
        )
        edit = await unless_gone(request.receive, work, limit_s=admission.seconds_left)
    return asked.spec(model, service.random_seed, edit), asked.output
