"""The OpenAPI document, with request schemas from the same tables that validate requests.

It holds the served model's limits and defaults, so it is made at the first request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.config import ApiConfig
from app.api.deps import DEADLINE, MIN_DEADLINE_S
from app.api.errors import REPLIES
from app.api.native.request import table
from app.api.openai import fields as openai_fields
from app.api.openai.stream_key import KEY, PATTERN
from app.api.schema.fields import about_mask
from app.api.system import tokens
from app.images.formats import OUTPUT_FORMATS
from app.service import previews
from app.service.service import ImageService

Json = dict[str, Any]
"""A JSON object of the document."""

_EVENTS = "text/event-stream"
_JSON = "application/json"
_FORM = "multipart/form-data"
_SMALL_PICTURE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEX/////AADrWueTAAAAcklEQVR42s3QsQ3C"
    "MBSE4c/PSKRkBDYhbO4RGCEjuIwQiilMCgsKyvzV6e6e9HQcj3P9iNuGjCWlIkjMvdJaJZiYiP00uHAiuBJjNJNG"
    "p5MpSOU7+kdkzNx/dwptdBY2gsprjFZWgicPgtZ/29cY9jkAb7FqFwcNkzldAAAAAElFTkSuQmCC"
)
_GENERATES = (400, 401, 403, 413, 415, 429, 500, 503, 504)
_ABOUT = (
    "One warm FLUX.2 klein pipeline behind HTTP: `POST /generate` answers with a picture's bytes, "
    "`POST /v1/images...` as OpenAI's image API does. Errors are OpenAI's error object, except "
    "under `/sdapi/v1/`, where the service answers as AUTOMATIC1111 does (docs/clients.md). "
    "`X-Klein-Deadline-S` shortens the time that a request may take."
)
_BYTES = {"type": "string", "format": "binary"}
_DEADLINE = {
    "name": DEADLINE,
    "in": "header",
    "required": False,
    "description": "Seconds that the client is willing to wait; only ever shortens the limit.",
    "schema": {"type": "number", "minimum": MIN_DEADLINE_S},
}
_KEY = {
    "name": KEY,
    "in": "header",
    "required": False,
    "description": (
        "Keeps a stream for a minute when its connection ends; the same key with the same body "
        f"reads it again from its start. It must match `{PATTERN}`. Without `stream` it has no "
        "effect, whatever it is."
    ),
    "schema": {"type": "string"},
}
_NULLABLE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
            "additionalProperties": False,
        }
    },
}

_JOB = {
    "type": "object",
    "required": [
        "id",
        "object",
        "created",
        "request_id",
        "state",
        "position",
        "images",
        "images_done",
        "progress",
    ],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "job"},
        "created": {"type": "integer", "description": "Seconds since 1970."},
        "request_id": {"type": "string", "description": "The request's X-Request-Id."},
        "state": {"enum": ["queued", "running", "cancelled"]},
        "position": {
            "type": ["integer", "null"],
            "description": "Pictures that are begun before its first; null once that is begun.",
        },
        "images": {"type": "integer"},
        "images_done": {"type": "integer"},
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "additionalProperties": False,
}

_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_REST = frozenset({"/sleep", "/wake", "/wake_up", "/is_sleeping"})
_COUNTED = {
    "type": "object",
    "required": ["object", "tokens", "limit", "cut_at"],
    "properties": {
        "object": {"const": "tokens"},
        "tokens": {"type": "integer", "description": "With the chat template around the prompt."},
        "limit": {"type": "integer", "description": "What the model reads."},
        "cut_at": {
            "type": ["integer", "null"],
            "description": "The first character that is not read; null where all are.",
        },
    },
}
_LEVEL = {
    "name": "level",
    "in": "query",
    "required": False,
    "schema": {"type": "integer", "enum": [1, 2]},
    "description": "vLLM's; both mean the same here. A JSON body may have it too.",
}
_RESTING = {
    "type": "object",
    "required": ["is_sleeping", "state", "message"],
    "properties": {
        "is_sleeping": {"type": "boolean"},
        "state": {"type": "string", "description": "As in `/health/ready`."},
        "message": {"type": "string"},
    },
}
_LORA = {
    "type": "object",
    "required": [
        "id",
        "object",
        "parent",
        "rank",
        "size_bytes",
        "sha256",
        "created",
        "scale",
        "preview",
    ],
    "properties": {
        "id": {"type": "string", "description": "What requests name it by."},
        "object": {"const": "lora"},
        "parent": {"type": "string", "description": "The id of the model that it changes."},
        "rank": {"type": "integer"},
        "size_bytes": {"type": "integer"},
        "sha256": _SHA256,
        "created": {"type": "integer", "description": "When its file was changed, since 1970."},
        "scale": {
            "type": ["number", "null"],
            "description": "Of pictures whose request names no adapters; null: none.",
        },
        "preview": {
            "type": ["string", "null"],
            "description": "The path of its picture, where one lies beside its file.",
        },
    },
    "additionalProperties": False,
}


def describe(app: FastAPI, service: ImageService, config: ApiConfig) -> Json:
    """Return the OpenAPI document for the model and the limits of *service*."""
    document = get_openapi(
        title=app.title, version=app.version, description=_ABOUT, routes=app.routes
    )
    paths = document["paths"]
    document["components"] = {
        "schemas": {"Error": _ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{}, {"key": []}]
    for methods in paths.values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"].update(_errors((401, 500)))
    for path, (contents, reply) in _posts(service, config).items():
        paths[path]["post"] |= {
            "requestBody": {"required": True, "content": contents},
            "parameters": [_DEADLINE] if path == "/generate" else [_DEADLINE, _KEY],
            "responses": {"200": reply, **_errors(_GENERATES)},
        }
    paths["/v1/images/files/{name}"]["get"] |= {
        "responses": {"200": _picture_reply(), **_errors((404, 500))},
        "security": [{}],
    }
    lookup = paths["/v1/models/{id}"]["get"]
    lookup["responses"].update(_errors((404,)))
    lookup["parameters"][0]["example"] = service.model.id
    paths["/v1/jobs"]["get"]["responses"]["200"] = _reply("The jobs.", [_JSON], _list_of(_JOB))
    paths["/v1/jobs/{id}"]["delete"]["responses"] |= {
        "200": _reply("The job as it was.", [_JSON], _JOB),
        **_errors((403, 404)),
    }
    paths["/v1/loras"]["get"]["responses"]["200"] = _reply("The adapters.", [_JSON], _all_of(_LORA))
    paths["/v1/loras/{name}"]["get"]["responses"] |= {
        "200": _reply("The adapter.", [_JSON], _LORA),
        **_errors((404,)),
    }
    paths["/v1/loras/{name}/preview"]["get"]["responses"] |= {
        "200": _reply("The picture.", [previews.FORMAT.media_type], _BYTES),
        **_errors((404, 503)),
    }
    for path in _REST & paths.keys():
        for operation in paths[path].values():
            operation["responses"]["200"] = _reply("What the workers are at.", [_JSON], _RESTING)
    paths["/v1/tokens"]["post"] |= {
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {
                    "schema": tokens.table(config).describe(required=["prompt"]),
                    "example": {"prompt": "a red fox in the snow"},
                }
            },
        },
    }
    paths["/v1/tokens"]["post"]["responses"] |= {
        "200": _reply("The count.", [_JSON], _COUNTED),
        **_errors((400, 415, 503)),
    }
    if sleep := paths.get("/sleep"):
        sleep["post"]["parameters"] = [_LEVEL]
        sleep["post"]["responses"].update(_errors((400,)))
    for path in ("/health", "/health/ready"):
        paths[path]["get"]["responses"].update(_errors((503,)))
    paths["/metrics"]["get"]["responses"]["200"] = _reply("The exposition.", ["text/plain"], _BYTES)
    return document


def _posts(service: ImageService, config: ApiConfig) -> dict[str, tuple[Json, Json]]:
    """Return each route's request bodies by media type, and its reply."""
    asked = service.model, service.limits, config
    edits = openai_fields.table(*asked, is_edit=True)
    form = edits.describe(required=["prompt", "image"], is_form=True)
    form["properties"]["image"] = {
        "description": "PNG, JPEG or WebP; repeated, or as image[], for more than one.",
        "type": "array",
        "items": _BYTES,
        "minItems": 1,
        "maxItems": service.limits.max_references,
    }
    form["properties"]["mask"] = {"description": about_mask(config), **_BYTES}
    pictures = _reply("The pictures.", [_JSON], _images_schema())
    pictures["content"][_EVENTS] = {}  # OpenAPI 3.1 cannot describe a stream of events
    fox = {"prompt": "a red fox in the snow"}
    plain = {
        _JSON: {
            "schema": openai_fields.table(*asked, is_edit=False).describe(required=["prompt"]),
            "example": {**fox, "n": 2, "seed": 7},
        }
    }
    winter = {"prompt": "make it winter"}
    edited = {
        _FORM: {"schema": form, "example": {**winter, "image": "@picture.png"}},
        _JSON: {
            "schema": edits.describe(required=["prompt", "images"]),
            "example": {**winter, "images": [{"image_url": _SMALL_PICTURE}]},
        },
    }
    return {
        "/generate": (
            {
                _JSON: {
                    "schema": table(*asked).describe(required=["prompt"]),
                    "example": {**fox, "seed": 7},
                }
            },
            _picture_reply(),
        ),
        "/v1/images": (plain, pictures),
        "/v1/images/generations": (plain, pictures),
        "/v1/images/edits": (edited, pictures),
    }


def _picture_reply() -> Json:
    return _reply("The picture.", [each.media_type for each in OUTPUT_FORMATS.values()], _BYTES)


def _reply(about: str, media_types: Iterable[str], schema: Json) -> Json:
    return {
        "description": about,
        "content": {media_type: {"schema": schema} for media_type in media_types},
    }


def _list_of(entry: Json) -> Json:
    listed = _all_of(entry)
    return listed | {
        "required": [*listed["required"], "has_more"],
        "properties": listed["properties"] | {"has_more": {"type": "boolean"}},
    }


def _all_of(entry: Json) -> Json:
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": entry},
        },
        "additionalProperties": False,
    }


def _errors(statuses: Iterable[int]) -> Json:
    codes = {
        status: sorted({reply.code for reply in REPLIES.values() if reply.status == status})
        for status in statuses
    }
    reference = {"$ref": "#/components/schemas/Error"}
    return {
        str(status): _reply(f"Error: {', '.join(names)}.", [_JSON], reference)
        for status, names in codes.items()
    }


def _images_schema() -> Json:
    return {
        "type": "object",
        "required": ["created", "model", "data", "size", "output_format", "background", "usage"],
        "properties": {
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["seed"],
                    "properties": {
                        "b64_json": {"type": "string"},
                        "url": {"type": "string"},
                        "seed": {"type": "integer"},
                    },
                    "additionalProperties": False,
                },
                "minItems": 1,
            },
            "background": {"const": "opaque"},
            "output_format": {"enum": list(OUTPUT_FORMATS)},
            "quality": {"type": "string"},
            "size": {"type": "string", "pattern": r"^\d+x\d+$"},
            "usage": {"type": "object"},
            "loras": {
                "description": "The adapters that took part.",
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "scale", "sha256"],
                    "properties": {
                        "name": {"type": "string"},
                        "scale": {"type": "number"},
                        "sha256": _SHA256,
                    },
                    "additionalProperties": False,
                },
            },
            "warnings": {"type": "array", "items": {"type": "string"}},
        },
        "additionalProperties": False,
    }
