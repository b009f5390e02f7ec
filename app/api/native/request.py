"""The request of `POST /generate`: its fields and its validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.api.config import ApiConfig
from app.api.openai.request import read_output, read_prompt
from app.api.schema.fields import PROMPT, sampling_fields
from app.api.schema.json_scanner import LongText
from app.api.schema.table import Field, FieldTable, Type
from app.api.schema.uploads import MAX_URL, base64_or_data_url
from app.domain import ImageSpec, ModelSpec
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.images.preparing import Edit, Upload
from app.limits import DRAW, Limits


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A valid request."""

    prompt: str
    size: tuple[int, int] | None
    """(width, height) in pixels; None takes the model's default or the first image's size."""
    steps: int
    guidance_scale: float
    seed: int | None
    output: OutputFormat
    images: tuple[Upload, ...] = ()
    mask: Upload | None = None

    def spec(
        self, model: ModelSpec, random_seed: Callable[[], int], edit: Edit | None = None
    ) -> ImageSpec:
        """Make the spec of the one image."""
        width, height = self.size or (model.default_width, model.default_height)
        if edit is not None:
            width, height = edit.size
        return ImageSpec(
            prompt=self.prompt,
            width=width,
            height=height,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=random_seed() if self.seed is None else self.seed,
            references=() if edit is None else edit.references,
            mask=None if edit is None else edit.mask,
        )


def table(model: ModelSpec, config: ApiConfig) -> FieldTable:
    """Make the table of fields for *model*."""
    limits = Limits.of(model, config.max_pixels, config.max_references)
    return FieldTable(
        (
            PROMPT,
            _side("width", model.default_width, limits),
            _side("height", model.default_height, limits),
            *sampling_fields(model, limits),
            Field(
                "output_format",
                Type.TEXT,
                "File format of the answer.",
                choices=("png", "jpeg", "webp"),
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
                "PNG or WebP of the first picture's size; what is transparent is repainted.",
                is_picture=True,
                schema={"type": ["string", "null"], "maxLength": MAX_URL},
            ),
        ),
        is_strict=config.is_strict,
    )


def read(values: Mapping[str, Any], model: ModelSpec, config: ApiConfig) -> GenerateRequest:
    """Apply the rules that a table cannot state to its typed *values*.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    limits = Limits.of(model, config.max_pixels, config.max_references)
    images = _read_images(values, limits.max_references)
    mask = values.get("mask")
    if mask is not None and not images:
        raise InvalidRequest(
            "mask says where to repaint a picture; send it in images.",
            param="images",
            code="missing_required_parameter",
        )
    seed = values.get("seed")
    return GenerateRequest(
        prompt=read_prompt(values),
        size=_read_size(values, model, limits, is_edit=bool(images)),
        steps=values.get("num_inference_steps", model.default_steps),
        guidance_scale=values.get("guidance_scale", model.default_guidance),
        seed=None if seed == DRAW else seed,
        output=read_output(values),
        images=images,
        mask=None if mask is None else base64_or_data_url(mask, "mask"),
    )


def _read_images(values: Mapping[str, Any], most: int) -> tuple[Upload, ...]:
    sent = values.get("images", [])
    if len(sent) > most:
        raise InvalidRequest(
            f"images holds {len(sent)} pictures; the most is {most}.",
            param="images",
            code="array_above_max_length",
        )
    for index, text in enumerate(sent):
        if not isinstance(text, str | LongText):
            raise InvalidRequest(
                f"images[{index}] must be a string of base64.",
                param=f"images[{index}]",
                code="invalid_type",
            )
    return tuple(base64_or_data_url(text, f"images[{i}]") for i, text in enumerate(sent))


def _read_size(
    values: Mapping[str, Any], model: ModelSpec, limits: Limits, *, is_edit: bool
) -> tuple[int, int] | None:
    if "width" not in values and "height" not in values:
        return None
    for name, other in (("width", "height"), ("height", "width")):
        if is_edit and name not in values:
            raise InvalidRequest(
                f"{name} is missing beside {other}; send both, or neither.",
                param=name,
                code="missing_required_parameter",
            )
    size = (values.get("width", model.default_width), values.get("height", model.default_height))
    limits.check_size(*size)
    return size


def name_sides(error: InvalidRequest) -> InvalidRequest:
    """Change an error's `param` from `size` to `width`: this route has no `size`."""
    if error.param != "size":
        return error
    return InvalidRequest(error.message, param="width", code=error.code or "invalid_value")


def _side(name: str, default: int, limits: Limits) -> Field:
    return Field(
        name,
        Type.WHOLE,
        f"The {name} in pixels.",
        default=default,
        schema={
            "type": ["integer", "null"],
            "minimum": limits.min_side,
            "maximum": limits.max_side,
            "multipleOf": limits.multiple,
            "default": default,
        },
    )
