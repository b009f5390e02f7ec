"""The limits of one request: prompt, size, steps, guidance and seed; one set for HTTP and commands.

HTTP's schemas and the command line check them before anything is loaded or decoded, and the service
checks them again. An error names the valid range or the nearest valid value; no value is rounded
silently. Also the share of a common resource that one client may hold.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from app.domain import ImageSpec, ModelSpec
from app.errors import InvalidRequest

MAX_PROMPT = 32_000
"""Characters."""
MAX_SEED = 2**53 - 1
"""The largest seed that JavaScript's numbers represent exactly."""
STEP = 16
"""Sides are multiples of this: the VAE halves three times, the transformer takes 2x2 patches."""
MAX_RATIO = 3

DRAW = -1
"""The seed that stands for a random one."""

_SIZE = re.compile(r"([0-9]{2,5})x([0-9]{2,5})")
_NEARLY = re.compile(r"\s*([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})\s*")


@dataclass(frozen=True, slots=True)
class SizeRule:
    """The sizes a model generates here: multiples of 16 within these limits, from 1:3 to 3:1."""

    min_side: int
    max_side: int
    max_pixels: int

    @classmethod
    def of(cls, model: ModelSpec, max_pixels: int) -> SizeRule:
        """Combine the model's limits with the operator's."""
        return cls(model.min_side, model.max_side, min(model.max_pixels, max_pixels))

    def parse(self, text: str) -> tuple[int, int]:
        """Parse `WxH`; raises `InvalidRequest` for `size` that names the nearest valid one."""
        match = _SIZE.fullmatch(text)
        if match is not None:
            width, height = int(match[1]), int(match[2])
            self.check(width, height, param="size")
            return width, height
        nearly = _NEARLY.fullmatch(text)
        hint = (
            self._say_nearest(int(nearly[1]), int(nearly[2]))
            if nearly
            else self._say_nearest(1024, 1024)
        )
        raise InvalidRequest(
            f"size must be `auto` or width and height with a small x between them; {hint}.",
            param="size",
        )

    def check(self, width: int, height: int, *, param: str | None = None) -> None:
        """Check a size; an error names *param*, or the side that is wrong."""
        for name, side in (("width", width), ("height", height)):
            if not self.min_side <= side <= self.max_side or side % STEP:
                raise self._refuse(
                    f"a side must be a multiple of {STEP} from {self.min_side} to {self.max_side}",
                    (width, height),
                    param or name,
                )
        if max(width, height) > MAX_RATIO * min(width, height):
            raise self._refuse("the ratio must lie between 1:3 and 3:1", (width, height), param)
        if width * height > self.max_pixels:
            raise self._refuse(
                f"at most {self.max_pixels:,} pixels are possible", (width, height), param
            )

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return a valid size near *width* x *height*, keeping the aspect ratio if valid."""
        wide = float(min(max(width, self.min_side), 10 * self.max_side))
        high = float(min(max(height, self.min_side), 10 * self.max_side))
        wide, high = min(wide, MAX_RATIO * high), min(high, MAX_RATIO * wide)
        shrink = min(
            1.0, math.sqrt(self.max_pixels / (wide * high)), self.max_side / max(wide, high)
        )
        sides = [self._round(wide * shrink), self._round(high * shrink)]
        while sides[0] * sides[1] > self.max_pixels or max(sides) > MAX_RATIO * min(sides):
            sides[sides.index(max(sides))] -= STEP
        return sides[0], sides[1]

    def _round(self, side: float) -> int:
        lowest = -(-self.min_side // STEP) * STEP
        highest = self.max_side // STEP * STEP
        return max(lowest, min(highest, int(side / STEP + 0.5) * STEP))

    def _refuse(self, fault: str, size: tuple[int, int], param: str | None) -> InvalidRequest:
        hint = self._say_nearest(*size)
        return InvalidRequest(f"The size does not fit: {fault}; {hint}.", param=param or "width")

    def _say_nearest(self, width: int, height: int) -> str:
        wide, high = self.nearest(width, height)
        return f"the nearest valid size is {wide}x{high}"


def three_quarters(whole: int) -> int:
    """Return what one client may hold of *whole* while others want some too, at least one."""
    return max(1, whole * 3 // 4)


def check_spec(spec: ImageSpec, model: ModelSpec, max_pixels: int) -> None:
    """Refuse a spec that *model* never generates here, however much memory there is.

    Raises:
        InvalidRequest: with the field's name.
    """
    check_prompt(spec.prompt)
    SizeRule.of(model, max_pixels).check(spec.width, spec.height, param="size")
    if not 1 <= spec.num_inference_steps <= model.max_steps:
        raise InvalidRequest(
            f"num_inference_steps must lie between 1 and {model.max_steps}.",
            param="num_inference_steps",
        )
    check_guidance(spec.guidance_scale, model)
    if not 0 <= spec.seed <= MAX_SEED:
        raise InvalidRequest(f"seed must lie between {DRAW} and {MAX_SEED}.", param="seed")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is blank, too long, or not valid Unicode."""
    if not prompt.strip():
        raise InvalidRequest("prompt is blank; say what the picture should show.", param="prompt")
    if len(prompt) > MAX_PROMPT:
        raise InvalidRequest(
            f"prompt has {len(prompt):,} characters; the most is {MAX_PROMPT:,}.",
            param="prompt",
            code="string_above_max_length",
        )
    check_characters(prompt, "prompt")


def check_characters(text: str, param: str) -> None:
    """Refuse a lone surrogate, which JSON may contain and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair; send whole Unicode characters.", param=param
        ) from None


def check_guidance(scale: float, model: ModelSpec) -> None:
    """Refuse a guidance scale that has no effect or is out of range."""
    only = model.default_guidance
    if model.is_distilled and scale != only:
        raise InvalidRequest(
            f"guidance_scale must be {only:g} or left out: this model is distilled, and no other "
            "value has an effect.",
            param="guidance_scale",
            code="unsupported_value",
        )
    # False for NaN.
    if not 1 <= scale <= model.max_guidance:
        raise InvalidRequest(
            f"guidance_scale must lie between 1 and {model.max_guidance:g}.", param="guidance_scale"
        )
