"""Errors for values that are valid for OpenAI but not supported by this model."""

from __future__ import annotations

from app.errors import InvalidRequest
from app.images.formats import OUTPUT_FORMATS, format_names, list_words

OTHER_FORMATS = ("gif", "svg")
"""OpenAI's output formats that are not made here."""


def impossible(name: str, why: str) -> str:
    """Make the sentence that says why the field *name* is not supported."""
    return f"{name} is not possible here, since {why}; leave it out."


def transparent(background: str) -> None:
    """Refuse a background that the model cannot make."""
    if background == "transparent":
        raise InvalidRequest(
            "This model makes no transparent background; send opaque or auto.",
            param="background",
            code="unsupported_value",
        )


def negative_prompt(prompt: str) -> None:
    """Refuse a negative prompt that says something."""
    if prompt:
        raise InvalidRequest(
            impossible("negative_prompt", "the model has no negative branch"),
            param="negative_prompt",
            code="unsupported_parameter",
        )


def other_format(name: str) -> None:
    """Refuse OpenAI's formats that are not made here."""
    if name not in format_names():
        raise InvalidRequest(
            f"output_format {name} cannot be made here; take {list_words(OUTPUT_FORMATS)}.",
            param="output_format",
            code="unsupported_value",
        )
