"""OpenAI's images API: `/v1/images/generations`, its alias `/v1/images`, `/v1/images/edits`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.config import ApiConfig
from app.api.deps import DEADLINE, Client, DeadlineS, IsLarge, Service, decoders_of
from app.api.disconnect import await_images, unless_gone
from app.api.errors import own_names
from app.api.native.response import server_timing
from app.api.openai import edit_body, files
from app.api.openai import fields as openai_fields
from app.api.openai import request as openai_request
from app.api.openai import response as openai_response
from app.api.openai.edit_body import EditBody
from app.api.openai.events import EventWriter
from app.api.openai.image_store import ImageStore
from app.api.openai.request import SIDES, ImagesRequest
from app.api.pieces import PieceResponse
from app.api.request_context import context_of
from app.api.schema.body import content_type, read_json, require_json, unsupported_media
from app.api.schema.table import FieldTable
from app.api.sse import EventStream
from app.domain import ImageSpec, RawImage
from app.limits import Limits
from app.service.results import Picture
from app.service.service import ImageService
from app.service.ticket import Admission, Ticket

_FORM, _JSON = "multipart/form-data", "application/json"
_OWN_NAMES = {**SIDES, "references": "image", "images": "n", "deadline_s": DEADLINE}


def build_router(config: ApiConfig, links: ImageStore) -> APIRouter:
    """Make the router; images that are returned by URL go to the image store *links*."""
    router = APIRouter(tags=["openai"])

    @router.post("/v1/images", summary="The same as /v1/images/generations")
    @router.post("/v1/images/generations", summary="Make pictures of a prompt")
    async def generations(
        request: Request,
        service: Service,
        client: Client,
        deadline_s: DeadlineS,
        is_large: IsLarge,
    ) -> Response:
        require_json(request)
        model = service.model
        with service.admit(client=client, deadline_s=deadline_s, is_large=is_large) as admission:
            fields = openai_fields.table(model, config, is_edit=False)
            asked = openai_request.read(fields.read(await read_json(request)), model, config)
            context_of(request.scope).release_body()
            size = asked.size or (model.default_width, model.default_height)
            specs = asked.specs(size, asked.draw_seed(service.random_seed))
            with own_names(_OWN_NAMES):
                ticket = admission.submit(specs, asked.output)
        return await _Answer(request, service, config, links, asked, specs).make(ticket)

    @router.post("/v1/images/edits", summary="Make pictures of a prompt and other pictures")
    async def change(
        request: Request,
        service: Service,
        client: Client,
        deadline_s: DeadlineS,
        is_large: IsLarge,
    ) -> Response:
        media_type = content_type(request)
        if media_type not in {_FORM, _JSON}:
            raise unsupported_media(_FORM, _JSON)
        with service.admit(client=client, deadline_s=deadline_s, is_large=is_large) as admission:
            read = edit_body.read_form if media_type == _FORM else edit_body.read_object
            asked, specs = await _read_edit(request, read, service, admission, config)
            context_of(request.scope).release_body()
            with own_names(_OWN_NAMES):
                ticket = admission.submit(specs, asked.output)
        return await _Answer(request, service, config, links, asked, specs).make(ticket)

    return router


async def _read_edit(
    request: Request,
    read: Callable[[Request, FieldTable, int], Awaitable[EditBody]],
    service: ImageService,
    admission: Admission,
    config: ApiConfig,
) -> tuple[ImagesRequest, list[ImageSpec]]:
    """Read and decode the body; uploads are released before the images are queued."""
    model = service.model
    fields = openai_fields.table(model, config, is_edit=True)
    limits = Limits.of(model, config.max_pixels, config.max_references)
    body = await read(request, fields, limits.max_references)
    asked = openai_request.read(body.values, model, config)
    with own_names(_OWN_NAMES):
        admission.reserve(asked.n)
    work = decoders_of(request).prepare(
        body.images, body.mask, asked.size, limits.nearest, client=admission.client
    )
    edit = await unless_gone(request.receive, work, limit_s=admission.seconds_left)
    seed = asked.draw_seed(service.random_seed)
    return asked, asked.specs(edit.size, seed, references=edit.references, mask=edit.mask)


@dataclass(frozen=True, slots=True)
class _Answer:
    """The response to one accepted request: JSON at the end, or a stream of events."""

    request: Request
    service: ImageService
    config: ApiConfig
    links: ImageStore
    asked: ImagesRequest
    specs: Sequence[ImageSpec]

    async def make(self, ticket: Ticket) -> Response:
        """Wait for the images, or start the stream that does."""
        if self.asked.wants_stream:
            return self._stream(ticket)
        pictures = await await_images(ticket, self.request.receive)
        body = openai_response.answer(
            pictures,
            asked=self.asked,
            model=self.service.model.id,
            created=int(time.time()),
            references=self._references,
            links=self._keep(pictures) if self.asked.wants_links else None,
        )
        return PieceResponse(body, media_type=_JSON, headers=_headers(pictures))

    def _stream(self, ticket: Ticket) -> Response:
        (spec,) = self.specs
        verb = "image_edit" if spec.references else "image_generation"
        writer = EventWriter(verb, self.asked, (spec.width, spec.height), spec.references)
        messages = writer.messages(ticket, context_of(self.request.scope))
        return EventStream(messages, heartbeat_s=self.config.heartbeat_s, on_close=ticket.cancel)

    def _keep(self, pictures: Sequence[Picture]) -> list[str]:
        base = self.config.public_url or str(self.request.base_url).rstrip("/")
        client = context_of(self.request.scope).client
        names = [
            self.links.put(
                picture.data, format=picture.format, media_type=picture.media_type, client=client
            )
            for picture in pictures
        ]
        return [f"{base}{files.PATH}{name}" for name in names]

    @property
    def _references(self) -> tuple[RawImage, ...]:
        return self.specs[0].references


def _headers(pictures: Sequence[Picture]) -> dict[str, str]:
    headers = {}
    if len(pictures) == 1:
        headers["Server-Timing"] = server_timing(pictures[0])
    if warnings := openai_response.all_warnings(pictures):
        headers["X-Klein-Warnings"] = "; ".join(warnings)
    return headers
