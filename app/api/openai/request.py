"""The request of OpenAI's images API: each field is honoured, mapped, ignored or refused.

Only fields that cannot change the image are ignored: quality, style, moderation, user,
safety_identifier, complexity, input_fidelity. Nothing is clamped and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.api.config import ApiConfig
from app.api.errors import own_names
from app.api.openai.fields import ALIASES
from app.api.schema.unsupported_values import FORMATS
from app.domain import ImageSpec, Mask, ModelSpec, RawImage
from app.errors import InvalidRequest
from app.images import OutputFormat
from app.limits import DRAW, MAX_SEED, Limits, check_prompt

SIDES = {"width": "size", "height": "size"}
"""This dialect's field for a spec's sides."""

_ECHOED = frozenset({"low", "medium", "high", "xhigh", "max"})
_STREAM_ECHOED = _ECHOED | {"auto"}


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """A valid request; *size* is None for `auto`, *seed* None for a random one."""

    prompt: str
    n: int
    size: tuple[int, int] | None
    steps: int
    guidance_scale: float
    seed: int | None
    output: OutputFormat
    quality: str | None
    wants_links: bool
    wants_stream: bool
    partial_images: int

    def specs(
        self,
        size: tuple[int, int],
        first_seed: int,
        *,
        references: Sequence[RawImage] = (),
        mask: Mask | None = None,
    ) -> list[ImageSpec]:
        """Make one spec per image; image i has seed+i."""
        return [
            ImageSpec(
                prompt=self.prompt,
                width=size[0],
                height=size[1],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                seed=first_seed + index,
                references=tuple(references),
                mask=mask,
                previews=min(self.partial_images, self.steps - 1),
            )
            for index in range(self.n)
        ]

    def draw_seed(self, random_seed: Callable[[], int]) -> int:
        """Return the requested seed, or a random one with seed+n-1 still in range."""
        return min(random_seed(), MAX_SEED - self.n + 1) if self.seed is None else self.seed

    @property
    def echoed_quality(self) -> str | None:
        """The quality for a plain response; None if openai-python's strict mode rejects it."""
        return self.quality if self.quality in _ECHOED else None

    @property
    def streamed_quality(self) -> str:
        """The quality for an event, which must have one."""
        return self.quality if self.quality in _STREAM_ECHOED else "auto"


def read(values: Mapping[str, Any], model: ModelSpec, config: ApiConfig) -> ImagesRequest:
    """Apply the rules that a table cannot state to its typed *values*.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    check_model(values.get("model", ""), model, config)
    n = values.get("n", 1)
    stream = values.get("stream", False)
    partials = values.get("partial_images", 0)
    _check_stream(values, n, stream=stream, partials=partials)
    return ImagesRequest(
        prompt=read_prompt(values),
        n=n,
        size=_read_size(values, Limits.of(model, config.max_pixels)),
        steps=_read_steps(values, model),
        guidance_scale=values.get("guidance_scale", model.default_guidance),
        seed=_read_seed(values, n),
        output=read_output(values),
        quality=values.get("quality"),
        wants_links=_wants_links(values, config, stream=stream),
        wants_stream=stream,
        partial_images=partials,
    )


def read_prompt(values: Mapping[str, Any]) -> str:
    """Read the prompt, which must not be blank."""
    if "prompt" not in values:
        raise InvalidRequest(
            "prompt is missing; say what the picture should show.",
            param="prompt",
            code="missing_required_parameter",
        )
    prompt: str = values["prompt"]
    check_prompt(prompt)
    return prompt


def read_output(values: Mapping[str, Any]) -> OutputFormat:
    """Read format and compression; PNG is lossless, and takes only compression 100."""
    name = FORMATS[values.get("output_format", "png")]
    compression = values.get("output_compression", 100)
    if name == "png" and compression != 100:
        raise InvalidRequest(
            "output_compression must be 100 or left out with png; or take jpeg or webp.",
            param="output_compression",
            code="invalid_png_output_compression",
        )
    return OutputFormat(name, compression)


def check_model(name: str, model: ModelSpec, config: ApiConfig) -> None:
    """Refuse a name that does not mean the served model.

    The status is 400, since Nextcloud takes 404 for a missing API.
    """
    if not is_model(name, model, config):
        raise InvalidRequest(
            f"This model is not served here; send `{model.id}`, or leave `model` out.",
            param="model",
            code="model_not_found",
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


def _check_stream(values: Mapping[str, Any], n: int, *, stream: bool, partials: int) -> None:
    if stream and n > 1:
        raise InvalidRequest("Streaming is only supported with n=1.", param="n")
    if stream and values.get("response_format") == "url":
        raise InvalidRequest(
            "A stream always carries b64_json; leave response_format out.",
            param="response_format",
            code="unsupported_value",
        )
    if partials and not stream:
        raise InvalidRequest(
            "partial_images need stream: true; set it, or leave partial_images out.",
            param="partial_images",
        )


def _read_size(values: Mapping[str, Any], limits: Limits) -> tuple[int, int] | None:
    text = values.get("size", "auto")
    with own_names(SIDES):
        size = None if text == "auto" else limits.parse_size(text)
    if "width" not in values and "height" not in values:
        return size
    for name, other in (("width", "height"), ("height", "width")):
        if name not in values:
            raise InvalidRequest(
                f"{name} is missing beside {other}; send both, or `size`.",
                param=name,
                code="missing_required_parameter",
            )
    asked = (values["width"], values["height"])
    limits.check_size(*asked)
    if size not in {None, asked}:
        raise InvalidRequest(
            "width and height say another size than `size`; send only one of the two.",
            param="width",
        )
    return asked


def _read_steps(values: Mapping[str, Any], model: ModelSpec) -> int:
    steps, alias = values.get("num_inference_steps"), values.get("steps")
    if steps is not None and alias is not None and steps != alias:
        raise InvalidRequest(
            "steps and num_inference_steps differ; send only one of the two.", param="steps"
        )
    found = steps if steps is not None else alias
    return model.default_steps if found is None else int(found)


def _read_seed(values: Mapping[str, Any], n: int) -> int | None:
    seed: int | None = values.get("seed")
    if seed is None or seed == DRAW:
        return None
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"With n={n} the seed may be at most {MAX_SEED - n + 1}, since image i takes seed+i.",
            param="seed",
        )
    return seed
