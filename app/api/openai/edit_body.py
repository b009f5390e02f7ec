"""The body of an edit, as a form or as JSON: the same fields, and its images.

`image`, `image[]`, `image[0]` and repetitions of them are one list in order of arrival, since
clients differ. File names and declared types are never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from app.api.schema.body import read_json
from app.api.schema.json_scanner import LongText
from app.api.schema.multipart import Part, read_parts
from app.api.schema.table import FieldTable, shorten
from app.api.schema.uploads import data_url
from app.errors import InvalidRequest
from app.images.preparing import Upload

_PICTURE = re.compile(r"(image|mask)(\[[0-9]*\])?")


@dataclass(frozen=True, slots=True)
class EditBody:
    """The typed fields, the uploaded images and the mask of one request."""

    values: Mapping[str, Any]
    images: tuple[Upload, ...]
    mask: Upload | None


async def read_form(request: Request, table: FieldTable, max_images: int) -> EditBody:
    """Read `multipart/form-data`."""
    texts: dict[str, object] = {}
    files: dict[str, list[Upload]] = {"image": [], "mask": []}
    parts = await read_parts(request)
    while parts:
        part = parts.pop(0)  # no part is held both raw and read
        if picture := _PICTURE.fullmatch(part.name):
            files[picture[1]] += _read_file(part, picture[1])
        elif _has_file(part):
            raise _must_be("text, not a file", shorten(part.name))
        elif part.name in texts:
            raise InvalidRequest(
                f"{shorten(part.name)} is there more than once; send it once.",
                param=shorten(part.name),
            )
        else:
            texts[part.name] = part.text()
    values = table.read(texts, is_form=True)
    images, masks = files.values()
    _check_count(len(images), max_images, "image")
    if len(masks) > 1:
        raise InvalidRequest(
            "There is more than one mask; send one.", param="mask", code="array_above_max_length"
        )
    return EditBody(values, tuple(images), masks[0] if masks else None)


async def read_object(request: Request, table: FieldTable, max_images: int) -> EditBody:
    """Read OpenAI's JSON body, in which images are data URLs."""
    values = table.read(await read_json(request, has_pictures=True))
    sent = values.pop("images", [])
    mask = values.pop("mask", None)
    _check_count(len(sent), max_images, "images")
    images = tuple(_read_entry(entry, f"images[{index}]") for index, entry in enumerate(sent))
    return EditBody(values, images, None if mask is None else _read_entry(mask, "mask"))


def _has_file(part: Part) -> bool:
    """Whether it is a file; an empty file input is as absent as an empty text."""
    return part.is_file and bool(part.content or part.has_file_name)


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


def _check_count(count: int, most: int, param: str) -> None:
    if count == 0:
        raise InvalidRequest(
            f"{param} is missing; send at least one picture.",
            param=param,
            code="missing_required_parameter",
        )
    if count > most:
        raise InvalidRequest(
            f"There are {count} pictures; the most is {most}.",
            param=param,
            code="array_above_max_length",
        )


def _must_be(what: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {what}.", param=param, code="invalid_type")
