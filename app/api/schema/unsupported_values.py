"""Values that are valid for OpenAI and cannot be honoured by this model: why, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from app.errors import InvalidRequest

FORMATS: Mapping[str, Literal["png", "jpeg", "webp"]] = {
    "png": "png",
    "jpeg": "jpeg",
    "jpg": "jpeg",
    "webp": "webp",
}


def impossible(name: str, why: str) -> str:
    """Say why no value of the field *name* can be honoured."""
    return f"{name} is not possible here, since {why}; leave it out."


def transparent(background: str) -> InvalidRequest | None:
    """Refuse a background that the model cannot make."""
    if background != "transparent":
        return None
    return InvalidRequest(
        "This model makes no transparent background; send opaque or auto.",
        param="background",
        code="unsupported_value",
    )


def negative_prompt(prompt: str) -> InvalidRequest | None:
    """Refuse a negative prompt that says something."""
    if not prompt:
        return None
    return InvalidRequest(
        impossible("negative_prompt", "the model has no negative branch"),
        param="negative_prompt",
        code="unsupported_parameter",
    )


def other_format(name: str) -> InvalidRequest | None:
    """Refuse OpenAI's formats that are not made here."""
    if name in FORMATS:
        return None
    return InvalidRequest(
        f"output_format {name} cannot be made here; take png, jpeg or webp.",
        param="output_format",
        code="unsupported_value",
    )
