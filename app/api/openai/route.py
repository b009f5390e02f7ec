"""OpenAI's images API: `/v1/images/generations`, its alias `/v1/images`, `/v1/images/edits`.

`/v1/images/files/{name}` serves the images whose URLs `response_format=url` returns.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from app.api.openai.kept_streams import KeptStream, KeptStreams
from app.api.openai.request import ImagesRequest
from app.api.openai.stream_key import KEY, StreamKey
from app.api.pieces import Body, Data, PieceResponse
from app.api.schema import loras
from app.api.schema.body import FORM, JSON, content_type, read_json
from app.api.schema.request import SIDES
from app.api.sse import EventStream
from app.domain import ImageSpec, RawImage
from app.errors import Kind, KleinError
from app.request_context import current_request
from app.runtime import Runtime
from app.service.results import Picture, warnings_of
from app.service.ticket import Admission, Ticket

_FILES = "/v1/images/files/"
_Read = Callable[
    [Request, Runtime, Admission, ApiConfig], Awaitable[tuple[ImagesRequest, list[ImageSpec]]]
]
_OWN_NAMES = {**SIDES, "references": "image", "images": "n", "deadline_s": DEADLINE}


@dataclass(frozen=True, slots=True)
class _Stores:
    """What outlives a request: images that are returned by URL, and streams that have a key."""

    links: ImageStore
    kept: KeptStreams


def build_router(config: ApiConfig, links: ImageStore, kept: KeptStreams) -> APIRouter:
    """Make the router, which fills the image store *links* and the streams that are *kept*."""
    router = APIRouter(tags=["openai"])
    stores = _Stores(links, kept)

    @router.post("/v1/images", summary="The same as /v1/images/generations")
    @router.post("/v1/images/generations", summary="Make pictures of a prompt")
    async def generations(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, config, stores, _read_generation, JSON)

    @router.post("/v1/images/edits", summary="Make pictures of a prompt and other pictures")
    async def change(request: Request, runtime: Running) -> Response:
        return await _respond(request, runtime, config, stores, _read_edit, FORM, JSON)

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
    stores: _Stores,
    read: _Read,
    *media_types: str,
) -> Response:
    """Queue the images; wait and answer with JSON, or start the stream of events that waits."""
    kept, key = stores.kept, None
    if KEY in request.headers:
        key = StreamKey(request, about=read.__name__)
        request = key.watch(request)
        if stream := kept.join(current_request.get().client, key.text):
            # Whether there is room for another one does not matter.
            return await _follow(request, key, stream, kept, config)
    with admit(request, runtime.service, *media_types) as admission:
        asked, specs = await read(request, runtime, admission, config)
        current_request.get().release_body()
        if key is not None and asked.wants_stream:
            digest = await key.digest(request)
            stream = _keep(key, digest, kept, admission, asked, specs)
            return await _follow(request, key, stream, kept, config)
        with own_names(_OWN_NAMES):
            ticket = admission.submit(specs, asked.image.output)
    if asked.wants_stream:
        return EventStream(
            messages(ticket, asked, specs[0]),
            headers=_stream_headers(admission, asked, specs),
            heartbeat_s=config.heartbeat_s,
            on_close=ticket.cancel,
        )
    return await _answer(request, runtime, config, stores.links, ticket, asked, specs[0].references)


def _keep(
    key: StreamKey,
    digest: bytes,
    kept: KeptStreams,
    admission: Admission,
    asked: ImagesRequest,
    specs: Sequence[ImageSpec],
) -> KeptStream:
    """Queue the images and keep their stream, unless another request has done so meanwhile."""
    if stream := kept.join(admission.client, key.text):
        return stream
    key.check()
    room_bytes = kept.make_room(admission.client, *specs)
    with own_names(_OWN_NAMES):
        ticket = admission.submit(specs, asked.image.output)
    return kept.keep(
        key.text,
        digest,
        ticket,
        messages(ticket, asked, specs[0]),
        headers=_stream_headers(admission, asked, specs),
        room_bytes=room_bytes,
    )


async def _follow(
    request: Request, key: StreamKey, stream: KeptStream, kept: KeptStreams, config: ApiConfig
) -> Response:
    """Answer with all events of *stream*, which the request has joined, if it has its body."""
    try:
        stream.check(await key.digest(request))
    except BaseException:
        kept.leave(stream)
        raise
    current_request.get().release_body()
    return EventStream(
        stream.read(),
        headers=stream.headers,
        heartbeat_s=config.heartbeat_s,
        on_close=partial(kept.leave, stream),
    )


async def _answer(
    request: Request,
    runtime: Runtime,
    config: ApiConfig,
    links: ImageStore,
    ticket: Ticket,
    asked: ImagesRequest,
    references: Sequence[RawImage],
) -> Response:
    """Wait for the images and answer with JSON."""
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
        references=references,
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


def _stream_headers(
    admission: Admission, asked: ImagesRequest, specs: Sequence[ImageSpec]
) -> dict[str, str]:
    return _headers((*admission.warnings, *warnings_of(specs[0])), asked)


def _headers(warnings: Sequence[str], asked: ImagesRequest) -> dict[str, str]:
    headers = loras.headers(asked.image.loras)
    if warnings:
        headers["X-Klein-Warnings"] = "; ".join(warnings)
    return headers
