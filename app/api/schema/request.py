"""What both APIs read in the same way from a request's typed fields, and the specs it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.api.errors import own_names
from app.domain import ImageSpec, Lora, ModelSpec
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.images.formats import OUTPUT_FORMATS, format_names, list_words
from app.images.preparing import Edit, Size
from app.limits import DRAW, MAX_SEED, Limits, check_prompt
from app.service.service import ImageService

SIDES = {"width": "size", "height": "size"}
"""The field for a spec's sides where they came as one text."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What is asked of the images, valid."""

    prompt: str
    n: int
    size: Size | None
    """(width, height) in pixels; None takes the model's default or the first image's size."""
    steps: int
    guidance_scale: float
    seed: int | None
    """None draws one."""
    output: OutputFormat
    previews: int
    loras: tuple[Lora, ...]

    def specs(self, service: ImageService, edit: Edit | None = None) -> list[ImageSpec]:
        """Make one spec per image; image i has seed+i, and a drawn seed leaves room for that."""
        model, seed = service.model, self.seed
        asked = self.size or (model.default_width, model.default_height)
        width, height = edit.size if edit else service.limits.nearest(*asked)
        if seed is None:
            seed = min(service.random_seed(), MAX_SEED - self.n + 1)
        return [
            ImageSpec(
                prompt=self.prompt,
                width=width,
                height=height,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                seed=seed + index,
                references=edit.references if edit else (),
                mask=edit.mask if edit else None,
                previews=self.previews,
                loras=self.loras,
                scaled_to=self.size if self.size != (width, height) else None,
            )
            for index in range(self.n)
        ]


def read_image(
    values: Mapping[str, Any],
    model: ModelSpec,
    *,
    prompt: str,
    size: Size | None,
    loras: tuple[Lora, ...],
) -> ImageRequest:
    """Apply the rules that a table cannot state to the shared fields of its typed *values*.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    n, steps = values.get("n", 1), _read_steps(values, model)
    return ImageRequest(
        prompt=prompt,
        n=n,
        size=size,
        steps=steps,
        guidance_scale=values.get("guidance_scale", model.default_guidance),
        seed=_read_seed(values, n),
        output=_read_output(values),
        previews=min(values.get("partial_images", 0), steps - 1),
        loras=loras,
    )


def read_prompt(values: Mapping[str, Any]) -> str:
    """Read the prompt, which must not be blank."""
    prompt = require_prompt(values)
    check_prompt(prompt)
    return prompt


def require_prompt(values: Mapping[str, Any]) -> str:
    """Return the prompt, which may be blank; refuse its absence."""
    if "prompt" not in values:
        raise InvalidRequest(
            "prompt is missing; say what the picture should show.",
            param="prompt",
            code="missing_required_parameter",
        )
    prompt: str = values["prompt"]
    return prompt


def read_size(values: Mapping[str, Any], limits: Limits) -> Size | None:
    """Read `size`, or `width` and `height`, which must agree with it; None where it is `auto`."""
    text = values.get("size", "auto")
    with own_names(SIDES):
        size = None if text == "auto" else limits.parse_size(text)
    if "width" not in values and "height" not in values:
        return size
    require_both_sides(values, "`size`")
    asked = values["width"], values["height"]
    limits.check_size(*asked)
    if size not in {None, asked}:
        raise InvalidRequest(
            "width and height say another size than `size`; send only one of the two.",
            param="width",
        )
    return asked


def require_both_sides(values: Mapping[str, Any], instead: str) -> None:
    """Refuse one side without the other; *instead* says what to send else."""
    for name, other in (("width", "height"), ("height", "width")):
        if name not in values:
            raise InvalidRequest(
                f"{name} is missing beside {other}; send both, or {instead}.",
                param=name,
                code="missing_required_parameter",
            )


def _read_steps(values: Mapping[str, Any], model: ModelSpec) -> int:
    steps: int = values.get("num_inference_steps", values.get("steps", model.default_steps))
    if values.get("steps", steps) != steps:
        raise InvalidRequest(
            "steps and num_inference_steps differ; send only one of the two.", param="steps"
        )
    return steps


def _read_seed(values: Mapping[str, Any], n: int) -> int | None:
    seed: int = values.get("seed", DRAW)
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"With n={n} the seed may be at most {MAX_SEED - n + 1}, since image i takes seed+i.",
            param="seed",
        )
    return None if seed == DRAW else seed


def _read_output(values: Mapping[str, Any]) -> OutputFormat:
    """Read format and compression; a lossless format takes only compression 100."""
    name = format_names()[values.get("output_format", "png")]
    compression = values.get("output_compression", 100)
    if not OUTPUT_FORMATS[name].has_quality and compression != 100:
        lossy = list_words(each.name for each in OUTPUT_FORMATS.values() if each.has_quality)
        raise InvalidRequest(
            f"output_compression must be 100 or left out with {name}; or take {lossy}.",
            param="output_compression",
            code=f"invalid_{name}_output_compression",
        )
    return OutputFormat(name, compression)
