"""The routes under `/sdapi/v1/`; every error there has AUTOMATIC1111's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api.deps import DEADLINE, Running, admit
from app.api.disconnect import await_images, unless_disconnected
from app.api.errors import own_names
from app.api.pieces import PieceResponse
from app.api.schema import loras as lora_fields
from app.api.schema.body import read_json
from app.api.sdapi import response as sdapi_response
from app.api.sdapi.request import SdRequest, read_img2img, read_txt2img
from app.domain import ImageSpec
from app.request_context import current_request
from app.runtime import Runtime
from app.service.ticket import Admission, Tickets

_JSON = "application/json"
_NO_TYPE = ""  # Dify sends JSON without a Content-Type
_Read = Callable[[Request, Runtime, Admission], Awaitable[tuple[SdRequest, list[ImageSpec]]]]
_OWN_NAMES = {"references": "init_images", "images": "batch_size", "deadline_s": DEADLINE}


def build_router() -> APIRouter:
    """Make the router."""
    router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)
    own = Tickets()

    @router.post("/txt2img")
    async def txt2img(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, own, _read_txt2img)

    @router.post("/img2img")
    async def img2img(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, own, _read_img2img)

    @router.get("/progress")
    async def progress() -> Response:
        return JSONResponse(sdapi_response.progress(own.of(current_request.get().client)))

    @router.post("/interrupt")
    async def interrupt() -> Response:
        for ticket in own.of(current_request.get().client):
            ticket.cancel()
        return JSONResponse({})

    _add_lists(router)
    return router


def _add_lists(router: APIRouter) -> None:
    @router.get("/options")
    async def options(runtime: Running) -> Response:
        return JSONResponse(sdapi_response.options(runtime.service.model))

    @router.post("/options")
    async def set_options() -> Response:
        return JSONResponse(None)  # nothing can be chosen here, and clients insist on a 200

    @router.get("/sd-models")
    async def models(runtime: Running) -> Response:
        return JSONResponse(sdapi_response.list_models(runtime.service.model))

    @router.get("/loras")
    async def loras(runtime: Running) -> Response:
        return JSONResponse(sdapi_response.list_loras(runtime.service.adapters.listed()))

    @router.post("/refresh-loras")
    async def refresh_loras() -> Response:
        return JSONResponse(None)  # the folder is watched

    for name, entries in (
        ("samplers", sdapi_response.SAMPLERS),
        ("schedulers", sdapi_response.SCHEDULERS),
        ("upscalers", sdapi_response.UPSCALERS),
        ("latent-upscale-modes", ()),
        ("sd-vae", ()),
        ("sd-modules", ()),
    ):
        router.add_api_route(f"/{name}", _lister(entries))


def _lister(entries: tuple[dict[str, Any], ...]) -> Callable[[], Awaitable[Response]]:
    async def entries_of_it() -> Response:
        return JSONResponse(entries)

    return entries_of_it


async def _respond(request: Request, runtime: Runtime, own: Tickets, read: _Read) -> Response:
    """Queue the images, wait, and answer."""
    context, model = current_request.get(), runtime.service.model
    with admit(request, runtime.service, _JSON, _NO_TYPE) as admission:
        asked, specs = await read(request, runtime, admission)
        context.release_body()
        with own_names(_OWN_NAMES):
            ticket = admission.submit(specs, asked.image.output)
    own.add(ticket)
    pictures = await await_images(ticket, request.receive)
    headers = lora_fields.headers(asked.image.loras)
    if warnings := sdapi_response.warnings(pictures, asked):
        headers["X-Klein-Warnings"] = "; ".join(warnings)
    return PieceResponse(
        sdapi_response.answer(pictures, asked, model),
        media_type=_JSON,
        headers=headers,
    )


async def _read_txt2img(
    request: Request, runtime: Runtime, admission: Admission
) -> tuple[SdRequest, list[ImageSpec]]:
    model, limits = runtime.service.model, runtime.service.limits
    # Extensions put pictures into fields that are ignored here.
    body = await read_json(request, has_pictures=True)
    asked = read_txt2img(body, model, limits, runtime.service.adapters)
    return asked, asked.image.specs(runtime.service)


async def _read_img2img(
    request: Request, runtime: Runtime, admission: Admission
) -> tuple[SdRequest, list[ImageSpec]]:
    """Read and decode the body; uploads are released before the images are queued."""
    model, limits = runtime.service.model, runtime.service.limits
    body = await read_json(request, has_pictures=True)
    asked, uploads = read_img2img(body, model, limits, runtime.service.adapters)
    del body
    with own_names(_OWN_NAMES):
        admission.reserve(asked.image.n)
    work = runtime.decoders.prepare(
        uploads.images, uploads.mask, asked.image.size, limits.nearest, client=admission.client
    )
    edit = await unless_disconnected(request.receive, work, limit_s=admission.seconds_left)
    return asked, asked.image.specs(runtime.service, edit)
