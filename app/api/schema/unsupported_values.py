"""Errors for values that are valid for OpenAI but not supported by this model."""

from __future__ import annotations

from app.errors import InvalidRequest
from app.images.formats import OUTPUT_FORMATS, format_names, list_words

OTHER_FORMATS = ("gif", "svg")
"""OpenAI's output formats that are not made here."""


def impossible(name: str, why: str) -> str:
    """Make the sentence that says why the field *name* is not supported."""
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
    if name in format_names():
        return None
    return InvalidRequest(
        f"output_format {name} cannot be made here; take {list_words(OUTPUT_FORMATS)}.",
        param="output_format",
        code="unsupported_value",
    )
