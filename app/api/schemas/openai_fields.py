"""The fields of OpenAI's images API as one table, and which values of them are refused here.

Ignored is only what cannot change the picture: quality, style, moderation, user,
safety_identifier, complexity, input_fidelity. Such a field is still checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from app.api.config import ApiConfig
from app.api.schemas.fields import Field, FieldTable, Type
from app.api.schemas.sizes import SizeRule
from app.domain import ModelCard
from app.errors import InvalidRequest

MAX_PROMPT = 32_000
MAX_SEED = 2**53 - 1
MAX_IMAGES = 10
MAX_URL = 20_971_520
"""Characters of a picture in JSON; OpenAI's own limit."""
MAX_PARTIALS = 3
FORMATS: Mapping[str, Literal["png", "jpeg", "webp"]] = {
    "png": "png",
    "jpeg": "jpeg",
    "jpg": "jpeg",
    "webp": "webp",
}
PROMPT_SCHEMA = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_PROMPT,
    "pattern": r"\S",
    "examples": ["a red fox in the snow"],
}

_QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")


def table(card: ModelCard, config: ApiConfig, *, is_edit: bool) -> FieldTable:
    """List the fields of generations or edits for the model of *card*."""
    fields = _common(card, config) + (_edit_only(config) if is_edit else _generation_only())
    hints = {"image": "JSON carries pictures in `images`"} if is_edit else _EDIT_HINTS
    return FieldTable(fields, is_strict=config.is_strict, hints=hints)


def sampling_fields(card: ModelCard) -> tuple[Field, ...]:
    """List the fields about sampling and encoding that all routes share."""
    return (
        Field(
            "num_inference_steps",
            Type.WHOLE,
            "Denoising steps.",
            minimum=1,
            maximum=card.max_steps,
            default=card.default_steps,
        ),
        _guidance(card),
        Field(
            "seed",
            Type.WHOLE,
            "The same seed gives the same pixels; -1 or nothing draws one. It comes back.",
            minimum=-1,
            maximum=MAX_SEED,
            example=7,
        ),
        Field(
            "output_compression",
            Type.WHOLE,
            "Quality of jpeg and webp; png takes only 100.",
            minimum=0,
            maximum=100,
            default=100,
        ),
    )


def _guidance(card: ModelCard) -> Field:
    if card.is_distilled:
        only = card.default_guidance
        return Field(
            "guidance_scale",
            Type.NUMBER,
            f"This model is distilled: only {only:g} is possible.",
            veto=lambda value: None if value == only else _only_guidance(only),
            schema={"enum": [only, None], "default": only},
        )
    return Field(
        "guidance_scale",
        Type.NUMBER,
        "How closely to follow the prompt; 1 switches guidance off.",
        minimum=1,
        maximum=card.max_guidance,
        default=card.default_guidance,
    )


def _common(card: ModelCard, config: ApiConfig) -> tuple[Field, ...]:
    rule = SizeRule.of(card, config.max_pixels)
    return (
        Field(
            "prompt",
            Type.TEXT,
            "What the picture should show.",
            max_length=MAX_PROMPT,
            schema=PROMPT_SCHEMA,
        ),
        Field(
            "model",
            Type.TEXT,
            "The served model, its hub id or an OpenAI image model's name; may be left out.",
            schema={"enum": [card.id, *([card.hub_id] if card.hub_id else []), "", None]},
        ),
        Field(
            "n",
            Type.WHOLE,
            "How many pictures; image i has seed+i.",
            minimum=1,
            maximum=MAX_IMAGES,
            default=1,
        ),
        Field(
            "size",
            Type.TEXT,
            "`auto`, or WxH: multiples of 16, from 1:3 to 3:1; `auto` is "
            f"{card.default_width}x{card.default_height}, or the first image's shape.",
            default="auto",
            example=f"{card.default_width}x{card.default_height}",
        ),
        *(_side(name, rule) for name in ("width", "height")),
        Field("quality", Type.TEXT, "Without effect here.", choices=_QUALITIES),
        Field(
            "response_format",
            Type.TEXT,
            "Base64 in the answer, or a link that lives for an hour.",
            choices=("b64_json", "url"),
        ),
        Field(
            "output_format",
            Type.TEXT,
            "File format of the pictures.",
            choices=("png", "jpeg", "webp", "jpg", "gif", "svg"),
            veto=_refuse_format,
            default="png",
            schema={"enum": ["png", "jpeg", "webp", "jpg", None], "default": "png"},
        ),
        *sampling_fields(card),
        Field(
            "steps", Type.WHOLE, "Alias of num_inference_steps.", minimum=1, maximum=card.max_steps
        ),
        Field(
            "background",
            Type.TEXT,
            "Pictures are always opaque.",
            choices=("transparent", "opaque", "auto"),
            veto=_refuse_transparent,
            schema={"enum": ["opaque", "auto", None]},
        ),
        Field("moderation", Type.TEXT, "Without effect here.", choices=("low", "auto")),
        Field("user", Type.TEXT, "Without effect here; never logged."),
        Field("safety_identifier", Type.TEXT, "Without effect here; never logged."),
        Field("complexity", Type.TEXT, "Without effect here.", choices=("low", "medium", "high")),
        Field("stream", Type.FLAG, "Answer with server-sent events; n must be 1.", default=False),
        Field(
            "partial_images",
            Type.WHOLE,
            "How many previews a stream carries.",
            minimum=0,
            maximum=MAX_PARTIALS,
            default=0,
        ),
        *(
            Field(
                name, Type.ANY, "Not possible here.", refusal=_refusal(name, "pictures stand still")
            )
            for name in ("svg", "frame_count", "frame_duration_ms")
        ),
        Field(
            "negative_prompt",
            Type.TEXT,
            "Must be empty.",
            veto=_refuse_negative,
            schema={"enum": ["", None]},
        ),
    )


def _side(name: str, rule: SizeRule) -> Field:
    return Field(
        name,
        Type.WHOLE,
        f"The {name} in pixels, instead of `size`; both or neither.",
        schema={
            "type": ["integer", "null"],
            "minimum": rule.min_side,
            "maximum": rule.max_side,
            "multipleOf": 16,
        },
    )


def _generation_only() -> tuple[Field, ...]:
    return (Field("style", Type.TEXT, "Without effect here.", choices=("vivid", "natural")),)


def _edit_only(config: ApiConfig) -> tuple[Field, ...]:
    picture = {
        "type": "object",
        "required": ["image_url"],
        "properties": {
            "image_url": {
                "type": "string",
                "description": "A data URL: data:image/png;base64,...; jpeg and webp too.",
                "pattern": "^data:image/(png|jpe?g|webp);base64,",
                "maxLength": MAX_URL,
            }
        },
        "additionalProperties": False,
    }
    return (
        Field("input_fidelity", Type.TEXT, "Without effect here.", choices=("low", "high")),
        Field(
            "markup",
            Type.ANY,
            "Not possible here.",
            refusal=_refusal("markup", "use a mask instead"),
        ),
        Field(
            "images",
            Type.LIST,
            "The pictures to edit, the first one under the mask.",
            json_only=True,
            schema={
                "type": "array",
                "minItems": 1,
                "maxItems": config.max_references,
                "items": picture,
            },
        ),
        Field(
            "mask",
            Type.OBJECT,
            "PNG or WebP of the first picture's size; where it is transparent, it is repainted.",
            json_only=True,
            schema={"anyOf": [picture, {"type": "null"}]},
        ),
    )


_EDIT_HINTS = dict.fromkeys(
    ("image", "images", "image[]", "mask"), "pictures go to /v1/images/edits"
)


def _refusal(name: str, why: str) -> str:
    return f"{name} is not possible here, since {why}; leave it out."


def _only_guidance(only: float) -> InvalidRequest:
    return InvalidRequest(
        f"guidance_scale must be {only:g} or left out: this model is distilled, and no other value "
        "has an effect.",
        param="guidance_scale",
        code="unsupported_value",
    )


def _refuse_transparent(background: str) -> InvalidRequest | None:
    if background != "transparent":
        return None
    return InvalidRequest(
        "This model makes no transparent background; send opaque or auto.",
        param="background",
        code="unsupported_value",
    )


def _refuse_negative(prompt: str) -> InvalidRequest | None:
    if not prompt:
        return None
    return InvalidRequest(
        _refusal("negative_prompt", "the model has no negative branch"),
        param="negative_prompt",
        code="unsupported_parameter",
    )


def _refuse_format(name: str) -> InvalidRequest | None:
    if name in FORMATS:
        return None
    return InvalidRequest(
        f"output_format {name} cannot be made here; take png, jpeg or webp.",
        param="output_format",
        code="unsupported_value",
    )
