"""The request of OpenAI's images API: each field is honoured, mapped, ignored or refused.

Only fields that cannot change the image are ignored: quality, style, moderation, user,
safety_identifier, complexity, input_fidelity. Nothing is clamped and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.api.config import ApiConfig
from app.api.schema.loras import read_loras, say_near
from app.api.schema.request import ImageRequest, read_image, read_prompt, read_size
from app.api.schema.table import shorten
from app.domain import ALIASES, ModelSpec
from app.errors import InvalidRequest
from app.limits import Limits
from app.service.adapters import Adapters


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """A valid request: the images asked for, and how to answer."""

    image: ImageRequest
    quality: str | None
    wants_links: bool
    wants_stream: bool
    is_indexed: bool
    """Whether each event of the stream says which image it is of, so that n may be above 1."""


def read(
    values: Mapping[str, Any],
    model: ModelSpec,
    limits: Limits,
    config: ApiConfig,
    adapters: Adapters,
) -> ImagesRequest:
    """Apply the rules that a table cannot state to its typed *values*.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    chosen = _read_adapter(values.get("model", ""), model, config, adapters)
    stream = values.get("stream", False)
    _check_stream(values, stream=stream)
    prompt = read_prompt(values)
    size = read_size(values, limits)
    loras = read_loras(values, adapters, limits, chosen=chosen)
    return ImagesRequest(
        image=read_image(values, model, prompt=prompt, size=size, loras=loras),
        quality=values.get("quality"),
        wants_links=_wants_links(values, config, stream=stream),
        wants_stream=stream,
        is_indexed=values.get("indexed", False),
    )


def _read_adapter(name: str, model: ModelSpec, config: ApiConfig, adapters: Adapters) -> str:
    """Return *name* where it is an adapter's; empty where it means the served model alone."""
    if is_model(name, model, config):
        return ""
    if adapters.find(name) is not None:
        return name
    # The status is 400, since Nextcloud takes 404 for a missing API.
    word = shorten(name)
    near = say_near(name, adapters)
    raise InvalidRequest(
        f"The model `{word}` is not served here; send `{model.id}`, or leave `model` out{near}.",
        param="model",
        code="model_not_found",
        word=word,
    )


def is_model(name: str, model: ModelSpec, config: ApiConfig) -> bool:
    """Return whether *name* means the served model: its id, its hub id, an alias, or empty."""
    hub_id = (model.hub_id or model.id).lower()
    is_alias = config.has_aliases and name.startswith(ALIASES)
    return name in {"", model.id} or name.lower() == hub_id or is_alias


def _wants_links(values: Mapping[str, Any], config: ApiConfig, *, stream: bool) -> bool:
    asked = values.get("response_format")
    if asked == "url" and not config.has_links:
        raise InvalidRequest(
            "Links are switched off here; ask for response_format b64_json.",
            param="response_format",
            code="unsupported_value",
        )
    if asked is None:
        # OpenAI's default for DALL-E; LangChain's wrapper sets no format and reads only `url`.
        return config.has_links and not stream and values.get("model", "").startswith("dall-e-")
    return bool(asked == "url")


def _check_stream(values: Mapping[str, Any], *, stream: bool) -> None:
    is_indexed = values.get("indexed", False)
    if stream and values.get("n", 1) > 1 and not is_indexed:
        raise InvalidRequest(
            "Streaming is only supported with n=1. With indexed: true each event says which "
            "picture it is of, and n may be more.",
            param="n",
        )
    if is_indexed and not stream:
        raise InvalidRequest(
            "indexed needs stream: true; set it, or leave indexed out.", param="indexed"
        )
    if stream and values.get("response_format") == "url":
        raise InvalidRequest(
            "A stream always carries b64_json; leave response_format out.",
            param="response_format",
            code="unsupported_value",
        )
    if values.get("partial_images") and not stream:
        raise InvalidRequest(
            "partial_images need stream: true; set it, or leave partial_images out.",
            param="partial_images",
        )
