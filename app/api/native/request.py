"""The request of `POST /generate`: its fields and its validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.api.config import ApiConfig
from app.api.schema.fields import PROMPT, about_mask, sampling_fields, side
from app.api.schema.fields import size as size_field
from app.api.schema.json_scanner import LongText
from app.api.schema.loras import loras_field, read_loras
from app.api.schema.request import SIDES, ImageRequest, read_image, read_prompt, read_size
from app.api.schema.table import Field, FieldTable, Type
from app.api.schema.uploads import MAX_URL, base64_or_data_url
from app.domain import ModelSpec
from app.errors import InvalidRequest
from app.images.formats import OUTPUT_FORMATS
from app.images.preparing import Upload
from app.limits import Limits
from app.service.adapters import Adapters


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A valid request: the image asked for, and the uploads to make it of."""

    image: ImageRequest
    images: tuple[Upload, ...]
    mask: Upload | None
    names: Mapping[str, str]
    """The request's own names for fields of a spec, where they differ."""


def table(model: ModelSpec, limits: Limits, config: ApiConfig) -> FieldTable:
    """Make the table of fields for *model*."""
    return FieldTable(
        (
            PROMPT,
            side("width", "The width in pixels.", limits, model.default_width),
            side("height", "The height in pixels.", limits, model.default_height),
            size_field(model, limits),
            *sampling_fields(model, limits),
            loras_field(),
            Field(
                "output_format",
                Type.TEXT,
                "File format of the answer.",
                choices=tuple(OUTPUT_FORMATS),
                default="png",
            ),
            Field(
                "images",
                Type.LIST,
                "Pictures to edit, as base64 or data URLs; the size then follows the first one.",
                schema={
                    "type": ["array", "null"],
                    "maxItems": limits.max_references,
                    "items": {"type": "string", "maxLength": MAX_URL},
                },
            ),
            Field(
                "mask",
                Type.TEXT,
                about_mask(config),
                max_length=None,
                schema={"type": ["string", "null"], "maxLength": MAX_URL},
            ),
        ),
        is_strict=config.is_strict,
    )


def read(
    values: Mapping[str, Any], model: ModelSpec, limits: Limits, adapters: Adapters
) -> GenerateRequest:
    """Apply the rules that a table cannot state to its typed *values*.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    images = _read_images(values, limits)
    mask = values.get("mask")
    if mask is not None and not images:
        raise InvalidRequest(
            "mask says where to repaint a picture; send it in images.",
            param="images",
            code="missing_required_parameter",
        )
    prompt = read_prompt(values)
    has_sides = "width" in values or "height" in values
    if has_sides and "size" not in values and not images:
        values = {"width": model.default_width, "height": model.default_height, **values}
    size, loras = read_size(values, limits), read_loras(values, adapters, limits)
    return GenerateRequest(
        read_image(values, model, prompt=prompt, size=size, loras=loras),
        images,
        None if mask is None else base64_or_data_url(mask, "mask"),
        SIDES if "size" in values and not has_sides else {},
    )


def _read_images(values: Mapping[str, Any], limits: Limits) -> tuple[Upload, ...]:
    sent = values.get("images", [])
    limits.check_references(len(sent), "images")
    for index, text in enumerate(sent):
        if not isinstance(text, str | LongText):
            raise InvalidRequest(
                f"images[{index}] must be a string of base64.",
                param=f"images[{index}]",
                code="invalid_type",
            )
    return tuple(base64_or_data_url(text, f"images[{i}]") for i, text in enumerate(sent))
