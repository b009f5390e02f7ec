"""The fields and limits that the dialects share, so that they cannot diverge."""

from __future__ import annotations

from app.api.config import ApiConfig
from app.api.schema.table import Field, Type
from app.domain import ModelSpec
from app.images.formats import OUTPUT_FORMATS, list_words
from app.images.preparing import AUTO
from app.limits import DRAW, MAX_PROMPT, Limits

MAX_IMAGES = 10
"""Of one request."""

PROMPT = Field(
    "prompt",
    Type.TEXT,
    "What the picture should show.",
    max_length=MAX_PROMPT,
    schema={
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_PROMPT,
        "pattern": r"\S",
        "examples": ["a red fox in the snow"],
    },
)


def sampling_fields(model: ModelSpec, limits: Limits) -> tuple[Field, ...]:
    """Return the fields for sampling and encoding that all routes share."""
    return (
        Field(
            "num_inference_steps",
            Type.WHOLE,
            "Denoising steps.",
            minimum=1,
            maximum=limits.max_steps,
            default=model.default_steps,
        ),
        _guidance(model, limits),
        Field(
            "seed",
            Type.WHOLE,
            "The same seed gives the same pixels; -1 or nothing draws one. It comes back.",
            minimum=DRAW,
            maximum=limits.max_seed,
            example=7,
        ),
        Field(
            "output_compression",
            Type.WHOLE,
            _about_quality(),
            minimum=0,
            maximum=100,
            default=100,
        ),
    )


def side(name: str, about: str, limits: Limits, default: int | None = None) -> Field:
    """Return the field of the image's width or height in pixels."""
    return Field(
        name,
        Type.WHOLE,
        about,
        schema={
            "type": ["integer", "null"],
            "minimum": limits.asked.min_side,
            "maximum": limits.asked.max_side,
            "multipleOf": limits.asked.multiple,
            **({} if default is None else {"default": default}),
        },
    )


def size(model: ModelSpec, limits: Limits) -> Field:
    """Return the field of width and height in one text."""
    default = f"{model.default_width}x{model.default_height}"
    return Field(
        "size",
        Type.TEXT,
        f"`auto`, or WxH: multiples of {limits.asked.multiple}, from "
        f"1:{limits.asked.max_ratio} to {limits.asked.max_ratio}:1; `auto` is {default}, or the "
        "first image's shape.",
        default="auto",
        example=default,
    )


def about_mask(config: ApiConfig) -> str:
    """Return the description of a mask."""
    also = ", and white where all is opaque" if config.repaints == AUTO else ""
    return f"PNG or WebP of the first picture's size; transparent is repainted{also}."


def _about_quality() -> str:
    lossy = [name for name, each in OUTPUT_FORMATS.items() if each.has_quality]
    lossless = [name for name in OUTPUT_FORMATS if name not in lossy]
    takes = "takes" if len(lossless) == 1 else "take"
    return f"Quality of {list_words(lossy, 'and')}; {list_words(lossless, 'and')} {takes} only 100."


def _guidance(model: ModelSpec, limits: Limits) -> Field:
    if model.is_distilled:
        only = model.default_guidance
        return Field(
            "guidance_scale",
            Type.NUMBER,
            f"This model is distilled: only {only:g} is possible.",
            veto=limits.check_guidance,
            schema={"enum": [only, None], "default": only},
        )
    return Field(
        "guidance_scale",
        Type.NUMBER,
        "How closely to follow the prompt; 1 switches guidance off.",
        minimum=limits.min_guidance,
        maximum=limits.max_guidance,
        default=model.default_guidance,
    )
