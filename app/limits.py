"""The limits of one request: one rule set for HTTP, the command line, the service and the page.

HTTP's schemas and the command line check them before anything is loaded or decoded, and the service
checks them again. An error names a field of `domain.ImageSpec`, and the valid range or the nearest
valid value; no value is rounded silently. Also the share of a common resource that one client may
hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import ImageSpec, Lora, ModelSpec
from app.errors import InvalidRequest

MAX_PROMPT = 32_000
"""Characters."""
MAX_SEED = 2**53 - 1
"""The largest seed that JavaScript's numbers represent exactly."""

MAX_LORAS = 4
"""Adapters of one image."""
MAX_LORA_SCALE = 2.0
"""Scales lie between this and its negative."""

PREVIEW_SIDE = 256
"""Pixels of a preview's longer side, at most."""

DRAW = -1
"""The seed that stands for a random one."""

_SIZE = re.compile(r"([0-9]{2,5})x([0-9]{2,5})")
_NEARLY = re.compile(r"\s*([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})\s*")


def room(max_pixels: Sequence[int], references: int) -> float:
    """Return the pixels of the largest output with *references* reference images on a device.

    *max_pixels* is `ModelInfo.max_pixels`; where it is empty nothing limits them.
    """
    return max_pixels[min(references, len(max_pixels) - 1)] if max_pixels else math.inf


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for here; `/health` shows the fields under these names."""

    min_side: int
    max_side: int
    multiple: int
    """Sides are multiples of this."""
    max_pixels: int
    max_steps: int
    min_guidance: float
    """Equal to *max_guidance* for a distilled model: no other value has an effect."""
    max_guidance: float
    max_references: int
    max_ratio: int = 3
    """Of the longer side to the shorter one."""
    max_seed: int = MAX_SEED
    max_prompt_characters: int = MAX_PROMPT
    max_loras: int = MAX_LORAS
    max_lora_scale: float = MAX_LORA_SCALE
    max_lora_rank: int = 128
    """The most that the ranks of an image's adapters may sum up to."""
    scaled: Limits | None = None
    """The limits on sizes that may be asked for where they are wider than those that can be made.

    Such an image is made at the nearest size that can be made, and scaled; only the demo's are.
    """

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        max_pixels: int,
        max_references: int | None = None,
        scaled: Limits | None = None,
        max_lora_rank: int = 128,
    ) -> Limits:
        """Combine the model's limits with the operator's."""
        return cls(
            min_side=model.min_side,
            max_side=model.max_side,
            multiple=model.size_multiple,
            max_pixels=min(model.max_pixels, max_pixels),
            max_steps=model.max_steps,
            min_guidance=model.default_guidance if model.is_distilled else 1,
            max_guidance=model.max_guidance,
            max_references=model.max_references
            if max_references is None
            else min(model.max_references, max_references),
            scaled=scaled,
            max_lora_rank=max_lora_rank,
        )

    @property
    def asked(self) -> Limits:
        """The limits on sizes that may be asked for."""
        return self.scaled or self

    def check(self, spec: ImageSpec) -> None:
        """Refuse a spec that is never generated here, however much memory there is.

        Raises:
            InvalidRequest: with the name of the spec's field.
        """
        check_prompt(spec.prompt)
        self._check_made(spec.width, spec.height)
        self.check_size(*spec.output_size)
        if not 1 <= spec.num_inference_steps <= self.max_steps:
            raise InvalidRequest(
                f"num_inference_steps must lie between 1 and {self.max_steps}.",
                param="num_inference_steps",
            )
        self.check_guidance(spec.guidance_scale)
        self.check_references(len(spec.references), "references")
        self.check_loras(spec.loras)
        if not 0 <= spec.seed <= self.max_seed:
            raise InvalidRequest(f"seed must lie between {DRAW} and {self.max_seed}.", param="seed")

    def check_references(self, count: int, param: str) -> None:
        """Refuse more pictures than are read; *param* is the field that brought them."""
        if count > self.max_references:
            raise InvalidRequest(
                f"{param} holds {count} pictures; the most is {self.max_references}, since each "
                "one takes memory and time in every step.",
                param=param,
                code="array_above_max_length",
            )

    def check_loras(self, loras: Sequence[Lora]) -> None:
        """Refuse adapters that are too many, repeated, or too strong, or whose ranks are too high.

        One with the scale 0 takes no part, so its rank is not counted.
        """
        if len(loras) > self.max_loras:
            raise InvalidRequest(
                f"loras holds {len(loras)} adapters; the most is {self.max_loras}.",
                param="loras",
                code="array_above_max_length",
            )
        names = [lora.name for lora in loras]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequest(
                f"loras names {twice} twice; add the two scales up.", param="loras", word=twice
            )
        # False for NaN.
        if not all(abs(lora.scale) <= self.max_lora_scale for lora in loras):
            most = self.max_lora_scale
            raise InvalidRequest(
                f"loras has a scale that does not lie between -{most:g} and {most:g}.",
                param="loras",
            )
        rank = sum(lora.rank for lora in loras if lora.scale)
        if rank > self.max_lora_rank:
            raise InvalidRequest(
                f"loras has adapters of rank {rank} together; the most is {self.max_lora_rank} "
                "here, which the operator can raise (KLEIN_LORA_RANK).",
                param="loras",
            )

    def check_size(self, width: int, height: int) -> None:
        """Refuse a size that may not be asked for; the error names the nearest one that may."""
        self.asked._check_made(width, height)

    def _check_made(self, width: int, height: int) -> None:
        for name, side in (("width", width), ("height", height)):
            if not self.min_side <= side <= self.max_side or side % self.multiple:
                raise self._refuse(
                    f"a side must be a multiple of {self.multiple} from {self.min_side} to "
                    f"{self.max_side}",
                    (width, height),
                    name,
                )
        if max(width, height) > self.max_ratio * min(width, height):
            raise self._refuse(
                f"the ratio must lie between 1:{self.max_ratio} and {self.max_ratio}:1",
                (width, height),
            )
        if width * height > self.max_pixels:
            raise self._refuse(f"at most {self.max_pixels:,} pixels are possible", (width, height))

    def check_guidance(self, scale: float) -> None:
        """Refuse a guidance scale that has no effect or is out of range."""
        low, high = self.min_guidance, self.max_guidance
        if low == high != scale:
            raise InvalidRequest(
                f"guidance_scale must be {low:g} or left out: this model is distilled, and no "
                "other value has an effect.",
                param="guidance_scale",
                code="unsupported_value",
            )
        # False for NaN.
        if not low <= scale <= high:
            raise InvalidRequest(
                f"guidance_scale must lie between {low:g} and {high:g}.", param="guidance_scale"
            )

    def parse_size(self, text: str) -> tuple[int, int]:
        """Parse `WxH`; the error for any other text names the nearest valid size."""
        if match := _SIZE.fullmatch(text):
            width, height = int(match[1]), int(match[2])
            self.check_size(width, height)
            return width, height
        nearly = _NEARLY.fullmatch(text)
        say = self.asked._say_nearest
        hint = say(int(nearly[1]), int(nearly[2])) if nearly else say()
        raise InvalidRequest(
            f"size must be `auto` or width and height with a small x between them; {hint}.",
            param="width",
        )

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return a size near *width* x *height* that can be made; that size itself if it can.

        The aspect ratio is kept if it is valid.
        """
        grow = max(1.0, self.min_side / max(1, min(width, height)))
        wide, high = (
            float(min(max(side * grow, self.min_side), 10 * self.max_side))
            for side in (width, height)
        )
        wide, high = min(wide, self.max_ratio * high), min(high, self.max_ratio * wide)
        shrink = min(
            1.0, math.sqrt(self.max_pixels / (wide * high)), self.max_side / max(wide, high)
        )
        sides = [self._round(wide * shrink), self._round(high * shrink)]
        while sides[0] * sides[1] > self.max_pixels or max(sides) > self.max_ratio * min(sides):
            sides[sides.index(max(sides))] -= self.multiple
        return sides[0], sides[1]

    def _round(self, side: float) -> int:
        lowest = -(-self.min_side // self.multiple) * self.multiple
        highest = self.max_side // self.multiple * self.multiple
        return max(lowest, min(highest, int(side / self.multiple + 0.5) * self.multiple))

    def _refuse(self, fault: str, size: tuple[int, int], param: str = "width") -> InvalidRequest:
        return InvalidRequest(
            f"The size does not fit: {fault}; {self._say_nearest(*size)}.", param=param
        )

    def _say_nearest(self, width: int = 1024, height: int = 1024) -> str:
        wide, high = self.nearest(width, height)
        return f"the nearest valid size is {wide}x{high}"


def three_quarters(whole: int) -> int:
    """Return what one client may hold of *whole* while others want some too, at least one."""
    return max(1, whole * 3 // 4)


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
