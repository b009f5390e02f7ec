"""OpenAI's images API: `/v1/images/generations`, its alias `/v1/images`, `/v1/images/edits`.

`/v1/images/files/{name}` serves the images whose URLs `response_format=url` returns.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import DEADLINE, Running, admit
from app.api.disconnect import await_images, unless_disconnected
from app.api.errors import own_names
from app.api.native.response import server_timing
from app.api.openai import edit_body
from app.api.openai import fields as openai_fields
from app.api.openai import request as openai_request
from app.api.openai import response as openai_response
from app.api.openai.events import messages
from app.api.openai.image_store import ImageStore
from app.api.openai.request import ImagesRequest
from app.api.pieces import Body, Data, PieceResponse
from app.api.schema import loras
from app.api.schema.body import FORM, JSON, content_type, read_json
from app.api.schema.request import SIDES
from app.api.sse import EventStream
from app.domain import ImageSpec
from app.errors import Kind, KleinError
from app.request_context import current_request
from app.runtime import Runtime
from app.service.results import Picture, warnings_of
from app.service.ticket import Admission

_FILES = "/v1/images/files/"
_Read = Callable[
    [Request, Runtime, Admission, ApiConfig], Awaitable[tuple[ImagesRequest, list[ImageSpec]]]
]
_OWN_NAMES = {**SIDES, "references": "image", "images": "n", "deadline_s": DEADLINE}


def build_router(config: ApiConfig, links: ImageStore) -> APIRouter:
    """Make the router; images that are returned by URL come from the image store *links*."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/images", summary="The same as /v1/images/generations")
    @router.post("/v1/images/generations", summary="Make pictures of a prompt")
    async def generations(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, config, links, _read_generation, JSON)

    @router.post("/v1/images/edits", summary="Make pictures of a prompt and other pictures")
    async def change(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, config, links, _read_edit, FORM, JSON)

    @router.get(_FILES + "{name}", summary="Fetch a picture behind a link", response_class=Response)
    async def file(name: str) -> Response:
        link = links.get(name)
        if link is None:
            raise KleinError(
                "There is no picture behind this link, or no longer; ask for it again.",
                kind=Kind.NOT_FOUND,
            )
        return PieceResponse(
            Body(Data(link.data)),
            media_type=link.media_type,
            headers={"Cache-Control": f"private, max-age={int(links.lifetime_s)}"},
        )

    return router


async def _respond(
    request: Request,
    runtime: Runtime,
    config: ApiConfig,
    links: ImageStore,
    read: _Read,
    *media_types: str,
) -> Response:
    """Queue the images; wait and answer with JSON, or start the stream of events that waits."""
    with admit(request, runtime.service, *media_types) as admission:
        asked, specs = await read(request, runtime, admission, config)
        current_request.get().release_body()
        with own_names(_OWN_NAMES):
            ticket = admission.submit(specs, asked.image.output)
    if asked.wants_stream:
        stream = messages(ticket, asked, specs[0])
        return EventStream(
            stream,
            headers=_headers((*admission.warnings, *warnings_of(specs[0])), asked),
            heartbeat_s=config.heartbeat_s,
            on_close=ticket.cancel,
        )
    pictures = await await_images(ticket, request.receive)
    urls = None
    if asked.wants_links:
        base = config.own_url(request)
        urls = [f"{base}{_FILES}{_store(links, picture)}" for picture in pictures]
    body = openai_response.answer(
        pictures,
        asked=asked,
        model=runtime.service.model.id,
        created=int(time.time()),
        references=specs[0].references,
        links=urls,
    )
    headers = _headers(openai_response.all_warnings(pictures), asked)
    if len(pictures) == 1:
        headers["Server-Timing"] = server_timing(pictures[0])
        headers["X-Klein-Device"] = pictures[0].device
    return PieceResponse(body, media_type=JSON, headers=headers)


async def _read_generation(
    request: Request, runtime: Runtime, admission: Admission, config: ApiConfig
) -> tuple[ImagesRequest, list[ImageSpec]]:
    model, limits = runtime.service.model, runtime.service.limits
    fields = openai_fields.table(model, limits, config, is_edit=False)
    values = fields.read(await read_json(request))
    asked = openai_request.read(values, model, limits, config, runtime.service.adapters)
    return asked, asked.image.specs(runtime.service)


async def _read_edit(
    request: Request, runtime: Runtime, admission: Admission, config: ApiConfig
) -> tuple[ImagesRequest, list[ImageSpec]]:
    """Read and decode the body; uploads are released before the images are queued."""
    model, limits = runtime.service.model, runtime.service.limits
    fields = openai_fields.table(model, limits, config, is_edit=True)
    read = edit_body.read_form if content_type(request) == FORM else edit_body.read_object
    body = await read(request, fields, limits)
    asked = openai_request.read(body.values, model, limits, config, runtime.service.adapters)
    with own_names(_OWN_NAMES):
        admission.reserve(asked.image.n)
    with own_names(SIDES):
        mask = body.mask and replace(body.mask, repaints=config.repaints)
        work = runtime.decoders.prepare(
            body.images, mask, asked.image.size, limits.nearest, client=admission.client
        )
        edit = await unless_disconnected(request.receive, work, limit_s=admission.seconds_left)
    admission.warnings = edit.warnings
    return asked, asked.image.specs(runtime.service, edit)


def _store(links: ImageStore, picture: Picture) -> str:
    return links.put(
        picture.data,
        format=picture.format,
        media_type=picture.media_type,
        client=current_request.get().client,
    )


def _headers(warnings: Sequence[str], asked: ImagesRequest) -> dict[str, str]:
    headers = loras.headers(asked.image.loras)
    if warnings:
        headers["X-Klein-Warnings"] = "; ".join(warnings)
    return headers
