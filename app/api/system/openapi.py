"""The OpenAPI document, with request schemas from the same tables that validate requests.

It holds the served model's limits and defaults, so it is made when requested.
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
from app.domain import ModelSpec
from app.limits import Limits

_PICTURES = ("image/png", "image/jpeg", "image/webp")
_EVENTS = "text/event-stream"
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
    "`POST /v1/images...` as OpenAI's image API does. Errors are OpenAI's error object everywhere. "
    "`X-Klein-Deadline-S` shortens the time that a request may take."
)


def describe(app: FastAPI, model: ModelSpec, config: ApiConfig) -> dict[str, Any]:
    """Return the OpenAPI document for *model*."""
    document = get_openapi(
        title=app.title, version=app.version, description=_ABOUT, routes=app.routes
    )
    paths = document["paths"]
    document["components"] = {
        "schemas": {"Error": _error_schema()},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    document["security"] = [{}, {"key": []}]
    for methods in paths.values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"].update(_errors((401, 500)))
    _fill_generate(paths["/generate"]["post"], model, config)
    for path in ("/v1/images", "/v1/images/generations"):
        _fill_generations(paths[path]["post"], model, config)
    _fill_edits(paths["/v1/images/edits"]["post"], model, config)
    picture = paths["/v1/images/files/{name}"]["get"]
    picture["responses"] = {"200": _reply("The picture.", _PICTURES, _BYTES), **_errors((404, 500))}
    picture["security"] = [{}]
    lookup = paths["/v1/models/{id}"]["get"]
    lookup["responses"].update(_errors((404,)))
    lookup["parameters"][0]["example"] = model.id
    for path in ("/health", "/health/ready"):
        paths[path]["get"]["responses"].update(_errors((503,)))
    paths["/metrics"]["get"]["responses"]["200"] = _reply("The exposition.", ["text/plain"], _BYTES)
    return document


_BYTES = {"type": "string", "format": "binary"}


def _fill_generate(operation: dict[str, Any], model: ModelSpec, config: ApiConfig) -> None:
    schema = table(model, config).describe(required=["prompt"])
    example = {"prompt": "a red fox in the snow", "seed": 7}
    operation["requestBody"] = _body({"application/json": (schema, example)})
    operation["parameters"] = [_deadline()]
    operation["responses"] = {
        "200": _reply("The picture.", _PICTURES, _BYTES),
        **_errors(_GENERATES),
    }


def _fill_generations(operation: dict[str, Any], model: ModelSpec, config: ApiConfig) -> None:
    schema = openai_fields.table(model, config, is_edit=False).describe(required=["prompt"])
    example = {"prompt": "a red fox in the snow", "n": 2, "seed": 7}
    operation["requestBody"] = _body({"application/json": (schema, example)})
    operation["parameters"] = [_deadline()]
    operation["responses"] = _images_replies()


def _fill_edits(operation: dict[str, Any], model: ModelSpec, config: ApiConfig) -> None:
    table = openai_fields.table(model, config, is_edit=True)
    form = table.describe(required=["prompt", "image"], is_form=True)
    file = {"type": "string", "format": "binary"}
    form["properties"]["image"] = {
        "description": "PNG, JPEG or WebP; repeated, or as image[], for more than one.",
        "type": "array",
        "items": file,
        "minItems": 1,
        "maxItems": Limits.of(model, config.max_pixels, config.max_references).max_references,
    }
    form["properties"]["mask"] = {
        "description": "PNG or WebP of the first picture's size; transparent is repainted.",
        **file,
    }
    operation["requestBody"] = _body(
        {
            _FORM: (form, {"prompt": "make it winter", "image": "@picture.png"}),
            "application/json": (
                table.describe(required=["prompt", "images"]),
                {"prompt": "make it winter", "images": [{"image_url": _SMALL_PICTURE}]},
            ),
        }
    )
    operation["parameters"] = [_deadline()]
    operation["responses"] = _images_replies()


def _images_replies() -> dict[str, Any]:
    reply = _reply("The pictures.", ["application/json"], _images_schema())
    reply["content"][_EVENTS] = {}  # OpenAPI 3.1 cannot describe a stream of events
    return {"200": reply, **_errors(_GENERATES)}


def _body(contents: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    return {
        "required": True,
        "content": {
            media_type: {"schema": schema, "example": example}
            for media_type, (schema, example) in contents.items()
        },
    }


def _deadline() -> dict[str, Any]:
    return {
        "name": DEADLINE,
        "in": "header",
        "required": False,
        "description": "Seconds that the client is willing to wait; only ever shortens the limit.",
        "schema": {"type": "number", "minimum": MIN_DEADLINE_S},
    }


def _reply(about: str, media_types: Iterable[str], schema: dict[str, Any]) -> dict[str, Any]:
    content = {media_type: {"schema": schema} for media_type in media_types}
    return {"description": about, "content": content}


def _errors(statuses: Iterable[int]) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Error"}
    found = {}
    for status in statuses:
        codes = sorted({reply.code for reply in REPLIES.values() if reply.status == status})
        found[str(status)] = _reply(f"Error: {', '.join(codes)}.", ["application/json"], reference)
    return found


def _error_schema() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": nullable,
                    "code": nullable,
                },
                "additionalProperties": False,
            }
        },
    }


def _images_schema() -> dict[str, Any]:
    item = {
        "type": "object",
        "required": ["seed"],
        "properties": {
            "b64_json": {"type": "string"},
            "url": {"type": "string"},
            "seed": {"type": "integer"},
        },
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "required": ["created", "model", "data", "size", "output_format", "background", "usage"],
        "properties": {
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {"type": "array", "items": item, "minItems": 1},
            "background": {"const": "opaque"},
            "output_format": {"enum": ["png", "jpeg", "webp"]},
            "quality": {"type": "string"},
            "size": {"type": "string", "pattern": r"^\d+x\d+$"},
            "usage": {"type": "object"},
            "warnings": {"type": "array", "items": {"type": "string"}},
        },
        "additionalProperties": False,
    }
