"""`POST /generate`, in and out: our own words, one picture, its bytes as the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.api.config import ApiConfig
from app.api.schemas.fields import Field, FieldTable, Type
from app.api.schemas.openai import read_output, read_prompt
from app.api.schemas.openai_fields import MAX_PROMPT, PROMPT_SCHEMA, sampling_fields
from app.api.schemas.sizes import SizeRule
from app.domain import ImageSpec, ModelCard
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.service import Picture


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a valid request asks for."""

    prompt: str
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    seed: int | None
    output: OutputFormat

    def spec(self, random_seed: Callable[[], int]) -> ImageSpec:
        """Write the spec of the one picture."""
        return ImageSpec(
            prompt=self.prompt,
            width=self.size[0],
            height=self.size[1],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=random_seed() if self.seed is None else self.seed,
        )


def table(card: ModelCard, config: ApiConfig) -> FieldTable:
    """List the fields for the model of *card*."""
    rule = SizeRule.of(card, config.max_pixels)
    return FieldTable(
        (
            Field(
                "prompt",
                Type.TEXT,
                "What the picture should show.",
                max_length=MAX_PROMPT,
                schema=PROMPT_SCHEMA,
            ),
            _side("width", card.default_width, rule),
            _side("height", card.default_height, rule),
            *sampling_fields(card),
            Field(
                "output_format",
                Type.TEXT,
                "File format of the answer.",
                choices=("png", "jpeg", "webp"),
                default="png",
            ),
        ),
        is_strict=config.is_strict,
    )


def read(values: Mapping[str, Any], card: ModelCard, config: ApiConfig) -> GenerateRequest:
    """Apply the rules that a table cannot state to its typed *values*; raises `InvalidRequest`."""
    size = (values.get("width", card.default_width), values.get("height", card.default_height))
    SizeRule.of(card, config.max_pixels).check(*size)
    seed = values.get("seed")
    return GenerateRequest(
        prompt=read_prompt(values),
        size=size,
        steps=values.get("num_inference_steps", card.default_steps),
        guidance_scale=values.get("guidance_scale", card.default_guidance),
        seed=None if seed == -1 else seed,
        output=read_output(values),
    )


def headers(picture: Picture, request_id: str) -> dict[str, str]:
    """Say beside the bytes what was made and where the time went."""
    found = {
        "X-Request-Id": request_id,
        "X-Klein-Seed": str(picture.seed),
        "Server-Timing": server_timing(picture),
    }
    if picture.peak is not None:
        found["X-Klein-Peak-Vram-Bytes"] = str(picture.peak.reserved)
    if picture.warnings:
        found["X-Klein-Warnings"] = "; ".join(picture.warnings)
    return found


def server_timing(picture: Picture) -> str:
    """Write the stages in milliseconds, as browsers show them."""
    return ", ".join(
        f"{stage};dur={seconds * 1000:.3f}"
        for stage, seconds in picture.seconds.items()
        if math.isfinite(seconds)
    )


def name_sides(error: InvalidRequest) -> InvalidRequest:
    """Give a fault of the size to `width`: this route has no `size`."""
    if error.param != "size":
        return error
    return InvalidRequest(error.message, param="width", code=error.code or "invalid_value")


def _side(name: str, default: int, rule: SizeRule) -> Field:
    return Field(
        name,
        Type.WHOLE,
        f"The {name} in pixels.",
        default=default,
        schema={
            "type": ["integer", "null"],
            "minimum": rule.min_side,
            "maximum": rule.max_side,
            "multipleOf": 16,
            "default": default,
        },
    )
