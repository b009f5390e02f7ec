"""What an edit sends, as a form or as JSON: the same fields, and the pictures wherever they are.

`image`, `image[]`, `image[0]` and repetitions of them are one list in order of arrival, since every
client has its own habit. File names and declared types are never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.schemas.body import read_json
from app.api.schemas.fields import FieldTable, shorten
from app.api.schemas.uploads import Upload, data_url
from app.errors import InvalidRequest

MAX_FILES = 64
MAX_FIELDS = 64
MAX_TEXT_BYTES = 1024 * 1024

_IMAGE = re.compile(r"image(\[[0-9]*\])?")
_MASK = re.compile(r"mask(\[[0-9]*\])?")


@dataclass(frozen=True, slots=True)
class EditBody:
    """The typed fields, the pictures and the mask of one request."""

    values: Mapping[str, Any]
    images: tuple[Upload, ...]
    mask: Upload | None


class _MemoryParser(MultiPartParser):
    """Keeps uploads in memory; the body limit bounds them, and a read-only container has no
    disk.
    """

    spool_max_size = 2**40


async def read_form(request: Request, table: FieldTable, max_images: int) -> EditBody:
    """Read `multipart/form-data`."""
    texts: dict[str, object] = {}
    images: list[Upload] = []
    masks: list[Upload] = []
    for name, value in await _parse(request):
        if _IMAGE.fullmatch(name):
            images += _read_file(value, "image")
        elif _MASK.fullmatch(name):
            masks += _read_file(value, "mask")
        elif isinstance(value, bytes):
            raise _must_be("text, not a file", shorten(name))
        elif name in texts:
            raise InvalidRequest(
                f"{shorten(name)} is there more than once; send it once.", param=shorten(name)
            )
        else:
            texts[name] = value
    values = table.read(texts, is_form=True)
    _check_count(len(images), max_images, "image")
    if len(masks) > 1:
        raise InvalidRequest(
            "There is more than one mask; send one.", param="mask", code="array_above_max_length"
        )
    return EditBody(values, tuple(images), masks[0] if masks else None)


async def read_object(request: Request, table: FieldTable, max_images: int) -> EditBody:
    """Read OpenAI's JSON form, in which pictures are data URLs."""
    values = table.read(await read_json(request))
    sent = values.pop("images", [])
    mask = values.pop("mask", None)
    _check_count(len(sent), max_images, "images")
    images = tuple(_read_entry(entry, f"images[{index}]") for index, entry in enumerate(sent))
    return EditBody(values, images, None if mask is None else _read_entry(mask, "mask"))


async def _parse(request: Request) -> list[tuple[str, str | bytes]]:
    """Read the parts in order: a text as it is, a file as its bytes."""
    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_TEXT_BYTES}
    try:
        async with aclosing(request.stream()) as stream:
            form = await _MemoryParser(request.headers, stream, **limits).parse()
    except MultiPartException as error:
        raise InvalidRequest(
            f"The form cannot be read: {_say(error)}.", code="invalid_multipart"
        ) from None
    try:
        return [(name, await _content(value)) for name, value in form.multi_items()]
    finally:
        await form.close()


async def _content(value: UploadFile | str) -> str | bytes:
    """Give a part's content; a file input that nobody filled is as absent as an empty text."""
    if isinstance(value, str):
        return value
    data = await value.read()
    return data if data or value.filename else ""


def _read_file(value: str | bytes, param: str) -> list[Upload]:
    if isinstance(value, bytes):
        return [Upload(value, param)]
    if value:
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
    if not isinstance(entry["image_url"], str):
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


def _say(error: MultiPartException) -> str:
    """Name the limit that was met; what the parser says of damage may quote the body."""
    known = {
        "Too many files": f"it has more than {MAX_FILES} files",
        "Too many fields": f"it has more than {MAX_FIELDS} fields",
        "Part exceeded": f"a text has more than {MAX_TEXT_BYTES:,} bytes",
        "Missing boundary": "its content type has no boundary",
    }
    return next(
        (text for start, text in known.items() if error.message.startswith(start)),
        "it is damaged or cut short",
    )
