"""The body of an edit, as a form or as JSON: the same fields, and its images.

`image`, `image[]`, `image[0]` and repetitions of them are one list in order of arrival, since
clients differ. File names and declared types are never looked at. A text that is repeated as it was
counts once: async-openai sends output_compression twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from app.api.schema.body import read_json
from app.api.schema.json_scanner import LongText
from app.api.schema.loras import Parts, is_part
from app.api.schema.multipart import Part, read_parts
from app.api.schema.table import FieldTable, shorten
from app.api.schema.uploads import data_url
from app.errors import InvalidRequest
from app.images.preparing import Upload
from app.limits import Limits

_PICTURE = re.compile(r"(image|mask)(\[[0-9]*\])?")
_FILE = object()
"""The value of a file under a name that no field takes."""


@dataclass(frozen=True, slots=True)
class EditBody:
    """The typed fields, the uploaded images and the mask of one request."""

    values: Mapping[str, Any]
    images: tuple[Upload, ...]
    mask: Upload | None


async def read_form(request: Request, table: FieldTable, limits: Limits) -> EditBody:
    """Read `multipart/form-data`."""

    def is_wanted(name: str) -> bool:
        is_known = _PICTURE.fullmatch(name) or is_part(name) or table.find(name, is_form=True)
        return table.is_strict or bool(is_known)

    texts: dict[str, object] = {}
    files: dict[str, list[Upload]] = {"image": [], "mask": []}
    loras = Parts()
    parts = await read_parts(request, is_wanted)
    while parts:
        part = parts.pop(0)  # no part is held both raw and read
        if picture := _PICTURE.fullmatch(part.name):
            files[picture[1]] += _read_file(part, picture[1])
        elif is_part(part.name):
            if _has_file(part):
                raise _must_be("text, not a file", part.name)
            loras.take(part.name, part.text())
        elif (value := _read_value(part, table)) and texts.setdefault(part.name, value) != value:
            name = shorten(part.name)
            raise InvalidRequest(
                f"{name} is there more than once, with different values; send it once.", param=name
            )
    loras.add_to(texts)
    values = table.read(texts, is_form=True)
    images, masks = files.values()
    _check_count(len(images), limits, "image")
    if len(masks) > 1:
        raise InvalidRequest(
            "There is more than one mask; send one.", param="mask", code="array_above_max_length"
        )
    return EditBody(values, tuple(images), masks[0] if masks else None)


async def read_object(request: Request, table: FieldTable, limits: Limits) -> EditBody:
    """Read OpenAI's JSON body, in which images are data URLs."""
    values = table.read(await read_json(request, has_pictures=True))
    sent = values.pop("images", [])
    mask = values.pop("mask", None)
    _check_count(len(sent), limits, "images")
    images = tuple(_read_entry(entry, f"images[{index}]") for index, entry in enumerate(sent))
    return EditBody(values, images, None if mask is None else _read_entry(mask, "mask"))


def _has_file(part: Part) -> bool:
    """Whether it is a file; an empty file input is as absent as an empty text."""
    return part.is_file and bool(part.content or part.has_file_name)


def _read_value(part: Part, table: FieldTable) -> object:
    """Read a part that is no picture; empty where it is absent."""
    if not _has_file(part):
        return part.text()
    field = table.find(part.name, is_form=True)
    if field is not None and field.refusal is None:
        raise _must_be("text, not a file", part.name)
    return _FILE


def _read_file(part: Part, param: str) -> list[Upload]:
    if _has_file(part):
        return [Upload(part.content, param)]
    if part.content:
        raise _must_be("a file, not text", param)
    return []


def _read_entry(entry: object, param: str) -> Upload:
    if not isinstance(entry, dict):
        raise _must_be("an object with image_url", param)
    present = {name for name, value in entry.items() if value is not None}
    if present == {"file_id"}:
        raise InvalidRequest(
            "Files are not kept here; send the picture as image_url with a data URL.",
            param=f"{param}.file_id",
            code="unsupported_value",
        )
    if present != {"image_url"}:
        raise InvalidRequest(f"{param} must have image_url and nothing else.", param=param)
    if not isinstance(entry["image_url"], str | LongText):
        raise _must_be("a string", f"{param}.image_url")
    return data_url(entry["image_url"], f"{param}.image_url")


def _check_count(count: int, limits: Limits, param: str) -> None:
    if count == 0:
        raise InvalidRequest(
            f"{param} is missing; send at least one picture.",
            param=param,
            code="missing_required_parameter",
        )
    limits.check_references(count, param)


def _must_be(what: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {what}.", param=param, code="invalid_type")
