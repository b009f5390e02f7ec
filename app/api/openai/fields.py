"""The fields of OpenAI's images API as one table, and the values of them that are refused here.

Only fields that cannot change the image are ignored: quality, style, moderation, user,
safety_identifier, complexity, input_fidelity. They are still validated.
"""

from __future__ import annotations

from app.api.config import ApiConfig
from app.api.schema.fields import MAX_IMAGES, PROMPT, about_mask, sampling_fields, side, size
from app.api.schema.loras import loras_field
from app.api.schema.table import ABSENT, MAX_TEXT, Field, FieldTable, Type
from app.api.schema.uploads import MAX_URL
from app.domain import ALIASES, ModelSpec
from app.errors import InvalidRequest
from app.images.formats import OUTPUT_FORMATS, format_names, list_words
from app.limits import MAX_PROMPT, Limits

MAX_PARTIALS = 3

_QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")


def table(model: ModelSpec, limits: Limits, config: ApiConfig, *, is_edit: bool) -> FieldTable:
    """Make the table of fields of generations or edits for *model*."""
    steps = Field(
        "steps", Type.WHOLE, "Alias of num_inference_steps.", minimum=1, maximum=limits.max_steps
    )
    return FieldTable(
        (
            *_subject(model, limits, config),
            *_encoding(),
            *sampling_fields(model, limits),
            steps,
            loras_field(),
            *_DELIVERY,
            *_IGNORED,
            *_unsupported(),
            *(_edit_only(limits, config) if is_edit else _GENERATION_ONLY),
        ),
        is_strict=config.is_strict,
        hints=_EDIT_HINTS if is_edit else _GENERATION_HINTS,
    )


def _subject(model: ModelSpec, limits: Limits, config: ApiConfig) -> tuple[Field, ...]:
    return (
        PROMPT,
        Field(
            "model",
            Type.TEXT,
            "The served model, its hub id or an OpenAI image model's name; may be left out.",
            schema=_model_schema(model, config),
        ),
        Field(
            "n",
            Type.WHOLE,
            "How many pictures; image i has seed+i.",
            minimum=1,
            maximum=MAX_IMAGES,
            default=1,
        ),
        size(model, limits),
        *(
            side(name, f"The {name} in pixels, instead of `size`; both or neither.", limits)
            for name in ("width", "height")
        ),
    )


def _model_schema(model: ModelSpec, config: ApiConfig) -> dict[str, object]:
    names = [model.id, *([model.hub_id] if model.hub_id else []), "", None]
    if not config.has_aliases:
        return {"enum": names}
    pattern = f"^({'|'.join(ALIASES)})"
    return {
        "anyOf": [{"enum": names}, {"type": "string", "pattern": pattern, "maxLength": MAX_TEXT}]
    }


def _encoding() -> tuple[Field, ...]:
    other_formats = {
        name: f"output_format {name} cannot be made here; take {list_words(OUTPUT_FORMATS)}."
        for name in ("gif", "svg")
        if name not in format_names()
    }
    return (
        Field(
            "output_format",
            Type.TEXT,
            "File format of the pictures.",
            choices=(*format_names(), *other_formats),
            unsupported=other_formats,
            default="png",
            schema={"enum": [*format_names(), None], "default": "png"},
        ),
        Field(
            "background",
            Type.TEXT,
            "Pictures are always opaque.",
            choices=("transparent", "opaque", "auto"),
            unsupported={
                "transparent": "background must be opaque or auto, since the model paints every "
                "pixel and knows no transparency."
            },
            schema={"enum": ["opaque", "auto", None]},
        ),
    )


_DELIVERY = (
    Field(
        "response_format",
        Type.TEXT,
        "Base64 in the answer, or a link that lives for an hour.",
        choices=("b64_json", "url"),
    ),
    Field(
        "stream",
        Type.FLAG,
        "Answer with server-sent events; n must be 1, unless they are `indexed`.",
        default=False,
    ),
    Field(
        "indexed",
        Type.FLAG,
        "Not OpenAI's: each event of a stream has `image_index`, from 0, so that n may be above 1; "
        "comments begin with it.",
        default=False,
    ),
    Field(
        "partial_images",
        Type.WHOLE,
        "How many previews a stream carries.",
        minimum=0,
        maximum=MAX_PARTIALS,
        default=0,
    ),
)

_IGNORED = (
    Field("quality", Type.TEXT, "Without effect here.", choices=_QUALITIES),
    Field("moderation", Type.TEXT, "Without effect here.", choices=("low", "auto")),
    Field("user", Type.TEXT, "Without effect here; never logged."),
    Field("safety_identifier", Type.TEXT, "Without effect here; never logged."),
    Field("complexity", Type.TEXT, "Without effect here.", choices=("low", "medium", "high")),
)


def _unsupported() -> tuple[Field, ...]:
    still = f"only still pictures are made, as {list_words(OUTPUT_FORMATS)}"
    return (
        *(
            Field(
                name,
                Type.ANY,
                "Not possible here.",
                refusal=_impossible(name, still),
            )
            for name in ("svg", "frame_count", "frame_duration_ms")
        ),
        Field(
            "negative_prompt",
            Type.TEXT,
            "Must be empty.",
            max_length=MAX_PROMPT,
            veto=_refuse_negative_prompt,
            schema={"enum": ["", None]},
        ),
    )


_GENERATION_ONLY = (
    Field("style", Type.TEXT, "Without effect here.", choices=("vivid", "natural")),
)


def _edit_only(limits: Limits, config: ApiConfig) -> tuple[Field, ...]:
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
        "additionalProperties": ABSENT,
    }
    return (
        Field("input_fidelity", Type.TEXT, "Without effect here.", choices=("low", "high")),
        Field(
            "markup",
            Type.ANY,
            "Not possible here.",
            refusal=_impossible("markup", "only a mask says where to paint"),
        ),
        Field(
            "images",
            Type.LIST,
            "The pictures to edit, the first one under the mask.",
            json_only=True,
            schema={
                "type": "array",
                "minItems": 1,
                "maxItems": limits.max_references,
                "items": picture,
            },
        ),
        Field(
            "mask",
            Type.OBJECT,
            about_mask(config),
            json_only=True,
            schema={"anyOf": [picture, {"type": "null"}]},
        ),
    )


_PICTURES = r"(\w+_)?(image|file|picture)s?(_?\d{1,3}|\[\d*\]|_url)?"
_MASKS = r"masks?(_image|_file|_url|\[.*\])?"
_EDIT_HINTS = {
    _MASKS: "the mask goes into `mask`",
    _PICTURES: "pictures go into `image` in a form, and into `images` in JSON",
}
_GENERATION_HINTS = dict.fromkeys((_MASKS, _PICTURES), "pictures go to /v1/images/edits")


def _impossible(name: str, why: str) -> str:
    return f"{name} is not possible here, since {why}; leave it out."


def _refuse_negative_prompt(prompt: str) -> None:
    if prompt:
        raise InvalidRequest(
            _impossible("negative_prompt", "the model has no negative branch"),
            param="negative_prompt",
            code="unsupported_parameter",
        )
