"""The request of `txt2img` and `img2img`: what is honoured, mapped or left unused, with a note.

These clients send the defaults of Stable Diffusion whatever model is served, so nothing of their
sampling is refused: steps and guidance are mapped to what the model can do, and a note says so.
Sizes and seeds decide which picture it is; they are held to the same rules as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.api.errors import own_names
from app.api.schema.fields import MAX_IMAGES, PROMPT
from app.api.schema.json_scanner import LongText
from app.api.schema.loras import read_number, use_all
from app.api.schema.request import ImageRequest, read_image, read_prompt, require_both_sides
from app.api.schema.table import Field, FieldTable, Type
from app.api.schema.uploads import base64_or_data_url
from app.domain import ModelSpec
from app.errors import InvalidRequest
from app.images.preparing import BLACK, WHITE, Size, Upload
from app.limits import DRAW, MAX_LORAS, MAX_SEED, Limits
from app.service.adapters import Adapters

_ON = (True, "1", "true")
_OFF: tuple[object, ...] = (None, "", False, [], {})
"""Values of an unused field that ask for nothing; `False` is 0 too."""
_UNUSED: Mapping[str, tuple[object, ...]] = {
    "negative_prompt": (),
    "styles": (),
    "sampler_name": ("Euler",),
    "scheduler": ("automatic", "Automatic"),
    "subseed_strength": (),
    "restore_faces": (),
    "tiling": (),
    "enable_hr": (),
    "refiner_checkpoint": (),
    "script_name": (),
    "alwayson_scripts": (),
    "override_settings": (),
}
"""Fields without effect that are noted, each with the values that this service fulfils anyway."""
_UNUSED_IN_EDITS: Mapping[str, tuple[object, ...]] = {
    **_UNUSED,
    "denoising_strength": (),
    "mask_blur": (),
    "inpaint_full_res": (),
}

_LORA = re.compile(r"<lora:([^<>]*)>")
_MOST = 10_000
"""Of steps and guidance, before they are mapped to what the model takes."""
_FIELDS = (
    PROMPT,
    Field("width", Type.WHOLE, "The width in pixels."),
    Field("height", Type.WHOLE, "The height in pixels."),
    Field("steps", Type.WHOLE, "Denoising steps, mapped.", minimum=1, maximum=_MOST),
    Field("cfg_scale", Type.NUMBER, "Guidance, mapped.", minimum=-_MOST, maximum=_MOST),
    Field("seed", Type.WHOLE, "-1 draws one.", minimum=DRAW, maximum=MAX_SEED),
    Field("batch_size", Type.WHOLE, "Pictures, times n_iter.", minimum=1, maximum=MAX_IMAGES),
    Field("n_iter", Type.WHOLE, "Pictures, times batch_size.", minimum=1, maximum=MAX_IMAGES),
)
_TXT2IMG = FieldTable(_FIELDS, is_strict=False)
_IMG2IMG = FieldTable(
    (
        *_FIELDS,
        Field("init_images", Type.LIST, "The picture to edit, then references."),
        Field("mask", Type.TEXT, "White is repainted.", max_length=None),
    ),
    is_strict=False,
)


@dataclass(frozen=True, slots=True)
class SdRequest:
    """A valid request: the images asked for, and what the answer says of it."""

    image: ImageRequest
    prompt: str
    """As it was sent, with its adapters."""
    parameters: Mapping[str, Any]
    """The fields that were read, without pictures."""
    notes: tuple[str, ...]
    """What was mapped or is not used."""


@dataclass(frozen=True, slots=True)
class Uploads:
    """The pictures of an `img2img`."""

    images: tuple[Upload, ...]
    mask: Upload | None


def read_txt2img(
    body: Mapping[str, Any], model: ModelSpec, limits: Limits, adapters: Adapters
) -> SdRequest:
    """Read the body of `txt2img`.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    # As texts too, which pydantic, the original's reader, converts.
    values = _TXT2IMG.read(body, is_form=True)
    size = None
    if "width" in values or "height" in values:
        default = model.default_width, model.default_height
        size = values.get("width", default[0]), values.get("height", default[1])
    return _Reader(body, values, model, limits, adapters).read(size, _UNUSED)


def read_img2img(
    body: Mapping[str, Any], model: ModelSpec, limits: Limits, adapters: Adapters
) -> tuple[SdRequest, Uploads]:
    """Read the body of `img2img`.

    Raises:
        InvalidRequest: a value breaks a rule.
    """
    values = _IMG2IMG.read(body, is_form=True)
    images = _read_images(values.pop("init_images", []), limits)
    painted, mask = values.pop("mask", None), None
    if painted is not None:
        repaints = BLACK if body.get("inpainting_mask_invert") in _ON else WHITE
        mask = replace(base64_or_data_url(painted, "mask"), repaints=repaints)
    size = None
    if "width" in values or "height" in values:
        require_both_sides(values, "neither")
        size = values["width"], values["height"]
    asked = _Reader(body, values, model, limits, adapters).read(size, _UNUSED_IN_EDITS)
    return asked, Uploads(images, mask)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads what both kinds of requests share from a *body* and its typed *values*."""

    body: Mapping[str, Any]
    values: Mapping[str, Any]
    model: ModelSpec
    limits: Limits
    adapters: Adapters

    def read(self, size: Size | None, unused: Mapping[str, tuple[object, ...]]) -> SdRequest:
        """Apply the rules that a table cannot state."""
        values, model, limits = self.values, self.model, self.limits
        if size is not None:
            limits.check_size(*size)
        n = values.get("batch_size", 1) * values.get("n_iter", 1)
        if n > MAX_IMAGES:
            raise InvalidRequest(
                f"batch_size times n_iter is {n}; the most is {MAX_IMAGES}.", param="batch_size"
            )
        steps, guidance = _map_steps(values, model), _map_guidance(values, model, limits)
        names = {"n": n, "num_inference_steps": steps, "guidance_scale": guidance}
        if "seed" in values:
            names["seed"] = values["seed"]
        notes = [
            _note_mapped("steps", values.get("steps", steps), steps, model),
            _note_mapped("cfg_scale", values.get("cfg_scale", guidance), guidance, model),
            _note_unused(self.body, unused),
        ]
        sent = read_prompt(values)
        prompt, named = take_loras(sent)
        with own_names({"loras": "prompt"}):
            loras = use_all(named, self.adapters, limits) if named else self.adapters.default
        image = read_image(
            names, model, prompt=read_prompt({"prompt": prompt}), size=size, loras=loras
        )
        return SdRequest(image, sent, values, tuple(filter(None, notes)))


def take_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """Return *prompt* without its `<lora:name:0.8>`, and the names and scales of these.

    Without a scale it is 1. Where a second number gives a weight of its own to the image model,
    that one is meant: the text encoder takes no adapter.

    Raises:
        InvalidRequest: one cannot be read.
    """
    found: list[tuple[str, float]] = []
    kept, end = [], 0
    for match in _LORA.finditer(prompt):
        name, *numbers = (part.strip() for part in match[1].split(":"))
        scales = [read_number(each) for each in numbers[:2]] or [1.0]
        if not name or len(numbers) > 2 or None in scales:
            raise InvalidRequest(
                "prompt holds an adapter that cannot be read; write it as <lora:name:0.8>.",
                param="prompt",
            )
        if len(found) == MAX_LORAS:
            raise InvalidRequest(
                f"prompt holds more than {MAX_LORAS} adapters; take some out.", param="prompt"
            )
        found.append((name, scales[-1] or 0.0))
        kept.append(prompt[end : match.start()])
        end = match.end()
    if not found:
        return prompt, []
    return "".join((*kept, prompt[end:])).strip(), found


def _map_steps(values: Mapping[str, Any], model: ModelSpec) -> int:
    """Limit the steps: these clients send 10 to 50, of which a distilled model gains nothing."""
    most = model.default_steps if model.is_distilled else model.max_steps
    return min(int(values.get("steps", model.default_steps)), most)


def _map_guidance(values: Mapping[str, Any], model: ModelSpec, limits: Limits) -> float:
    asked = float(values.get("cfg_scale", model.default_guidance))
    return max(limits.min_guidance, min(limits.max_guidance, asked))


def _note_mapped(name: str, asked: float, used: float, model: ModelSpec) -> str:
    if asked == used:
        return ""
    why = "is distilled for it" if model.is_distilled else "takes no other"
    return f"{name} is {used:g} instead of {asked:g}, since the model {why}"


def _note_unused(body: Mapping[str, Any], unused: Mapping[str, tuple[object, ...]]) -> str:
    sent = [name for name, same in unused.items() if body.get(name) not in (*_OFF, *same)]
    return f"not used: {', '.join(sent)}" if sent else ""


def _read_images(sent: list[object], limits: Limits) -> tuple[Upload, ...]:
    if not sent:
        raise InvalidRequest(
            "init_images is missing; send at least one picture in base64.",
            param="init_images",
            code="missing_required_parameter",
        )
    limits.check_references(len(sent), "init_images")
    images = []
    for index, text in enumerate(sent):
        name = f"init_images[{index}]"
        if not isinstance(text, str | LongText):
            raise InvalidRequest(
                f"{name} must be a string of base64.", param=name, code="invalid_type"
            )
        images.append(base64_or_data_url(text, name))
    return tuple(images)
