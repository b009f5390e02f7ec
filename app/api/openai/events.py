"""The streamed response of OpenAI's images API: previews, the image, or one error.

Generations and edits differ in the prefix of each event's type. An error is sent in the one form
that the SDK raises: an object under `error`. What OpenAI has no event for is sent as comments,
which every client skips and the playground reads: `: queued 3`, `: waking 4.0` in seconds where
no worker is awake, `: denoise 2/4`, `: timing text;dur=21.5, ...` in the form of Server-Timing,
`: peak 9876543210` in bytes.

OpenAI's streams have one image. Where `indexed` is asked for, n images share one stream: each event
has `image_index`, each comment begins with it (`: 2 denoise 2/4`), and each image has its own
`completed`, with its own `usage`. The first error ends all of them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from app.api.errors import envelope, internal_error
from app.api.native.response import server_timing
from app.api.openai.request import ImagesRequest
from app.api.openai.response import ECHOED_QUALITIES, usage
from app.api.pieces import Body, Data
from app.domain import ImageSpec
from app.errors import KleinError
from app.request_context import current_request
from app.service.results import Picture, Preview, Queued, Waking, describe_loras
from app.service.ticket import Ticket

_log = logging.getLogger(__name__)


async def messages(
    ticket: Ticket, asked: ImagesRequest, spec: ImageSpec
) -> AsyncGenerator[bytes | Body, None]:
    """Yield the events of *ticket*, which is for *spec*, and the seeds after it, as *asked*.

    An error is sent, and kept for the log.
    """
    verb = "image_edit" if spec.references else "image_generation"
    width, height = spec.output_size
    common: dict[str, Any] = {
        "size": f"{width}x{height}",
        "quality": asked.quality if asked.quality in ECHOED_QUALITIES else "auto",
        "background": "opaque",
        "output_format": asked.image.output.format,
    }
    try:
        async with aclosing(ticket.events()) as events:
            async for index, event in events:
                about = common | {"image_index": index} if asked.is_indexed else common
                start = f": {index} " if asked.is_indexed else ": "
                if isinstance(event, Preview):
                    rest = about | {"partial_image_index": event.index}
                    yield _write(f"{verb}.partial_image", event.picture, rest)
                elif isinstance(event, Picture):
                    yield _measured(event, start)
                    yield _write(f"{verb}.completed", event.data, about | _result(event, spec))
                elif isinstance(event, Queued):
                    yield f"{start}queued {event.position}\n\n".encode()
                elif isinstance(event, Waking):
                    yield f"{start}waking {event.seconds:.1f}\n\n".encode()
                else:
                    yield f"{start}{event.stage} {event.step}/{event.steps}\n\n".encode()
    except KleinError as error:
        current_request.get().keep(error)
        yield _error(error)
    except Exception:
        _log.exception("A stream failed in a way that nothing expected.")
        current_request.get().error = internal_error()
        yield _error(internal_error())


def _result(picture: Picture, spec: ImageSpec) -> dict[str, Any]:
    more: dict[str, Any] = {"loras": describe_loras(picture.loras)} if picture.loras else {}
    if picture.warnings:
        more["warnings"] = picture.warnings
    return {"seed": picture.seed, "usage": usage([picture], spec.references), **more}


def _write(name: str, data: bytes, fields: Mapping[str, Any]) -> Body:
    # As in the plain response, base64 passes no JSON encoder.
    head = f'event: {name}\ndata: {{"type": "{name}", "b64_json": "'.encode()
    tail = json.dumps({"created_at": int(time.time()), **fields}).encode()[1:]
    return Body(head, Data(data, is_base64=True), b'", ' + tail + b"\n\n")


def _measured(picture: Picture, start: str) -> bytes:
    peak = "" if picture.peak is None else f"{start}peak {picture.peak.reserved}\n"
    return f"{start}timing {server_timing(picture)}\n{peak}\n".encode()


def _error(error: KleinError) -> bytes:
    return (
        b"event: error\ndata: "
        + json.dumps({"type": "error", **envelope(error)}).encode()
        + b"\n\n"
    )
