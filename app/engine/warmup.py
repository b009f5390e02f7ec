"""The images generated before the service is ready: a check of the model, and time to compile.

They are checked: an image of one colour, or with a value that is not finite, ends the start.

Where functions are compiled, an image at the default size compiles for that size, one at another
size for dynamic shapes, and one more of the default size is timed. After that nothing is compiled
any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from app.domain import Generated, ImageSpec, LoadProgress, ModelSpec, RawImage, WorkerStage
from app.engine import error_mapping
from app.engine.runtime import compile as compile_module
from app.errors import OutOfMemory, StartupError

_log = logging.getLogger(__name__)

Make = Callable[[ImageSpec], Generated]

NO_PICTURE = (
    "The warm-up picture shows nothing (one colour, or values that are no numbers): the weights "
    "are damaged or do not belong together, or a part of the model overflows at its precision. "
    "Check the files with `klein download --verify`, or try KLEIN_PRECISION=bf16."
)

_SMALL_PIXELS = 256 * 256


def warm_up(
    model: ModelSpec,
    device: torch.device,
    make: Make,
    on_progress: Callable[[LoadProgress], None],
    *,
    is_compiled: bool,
) -> float:
    """Generate images until all is warm; return the seconds of one at the default size.

    Raises:
        StartupError: the GPU has no memory even for a small image, or the output is not an image.
    """
    if device.type == "cpu":
        return _warm_processor(model, make, on_progress)
    on_progress(LoadProgress(WorkerStage.WARM_UP, 0.0, "the default size"))
    size = _make_first(model, make)
    if is_compiled:
        on_progress(LoadProgress(WorkerStage.WARM_UP, 0.5, "all other sizes"))
        _make_others(model, size, make)
        compile_module.freeze()
    # Free the fragmented memory that compilation and the other sizes left cached.
    error_mapping.give_back()
    on_progress(LoadProgress(WorkerStage.WARM_UP, 0.9, "measuring"))
    begun = time.perf_counter()
    spec = _spec(model, size, "a second warm-up picture")
    made = make(spec)
    took_s = time.perf_counter() - begun
    _look_at(made.image)
    return took_s * model.default_width * model.default_height / spec.pixels


def _warm_processor(
    model: ModelSpec, make: Make, on_progress: Callable[[LoadProgress], None]
) -> float:
    """Generate a small model's image in full, a large one's with one step at a quarter size.

    The side is divided by four. A full image of a large model may take minutes on a CPU.
    """
    pixels = model.default_width * model.default_height
    scale, steps = (1, model.default_steps) if pixels <= _SMALL_PIXELS else (4, 1)
    on_progress(LoadProgress(WorkerStage.WARM_UP, 0.0, f"{steps} steps"))
    size = (_side(model.default_width // scale), _side(model.default_height // scale))
    spec = _spec(model, size, "a warm-up picture", steps=steps)
    # The first image pays for lazy initialisation; the second is timed.
    _look_at(make(spec).image)
    error_mapping.give_back()
    begun = time.perf_counter()
    make(spec)
    return (time.perf_counter() - begun) * model.default_steps / steps * pixels / spec.pixels


def _make_first(model: ModelSpec, make: Make) -> tuple[int, int]:
    """Generate the default image, or the largest of two smaller ones that fits in memory."""
    for scale in (1, 2, 4):
        size = (_side(model.default_width // scale), _side(model.default_height // scale))
        try:
            _look_at(make(_spec(model, size, "a warm-up picture")).image)
            return size
        except OutOfMemory:
            _log.warning("A warm-up picture of %sx%s found no room.", *size)
    raise StartupError(
        "The card has no room even for a small picture; free its memory or set KLEIN_DEVICE=cpu."
    )


def _look_at(image: RawImage) -> None:
    """Refuse an image of one colour: no intact model draws one for these prompts."""
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(-1, 3)
    if (pixels == pixels[0]).all():
        raise StartupError(NO_PICTURE)


def _make_others(model: ModelSpec, size: tuple[int, int], make: Make) -> None:
    """Change both sides to compile with dynamic shapes; an edit warms the VAE encoder."""
    # Both sides differ from the default's and from one another: the compiler takes equal numbers
    # for the same symbol.
    other = (_side(size[0] * 3 // 4), _side(size[1] // 2))
    make(_spec(model, other, "another shape", steps=2))
    reference = RawImage(128, 192, bytes(128 * 192 * 3))
    third = (_side(size[0] // 2), _side(size[1] * 5 // 8))
    make(_spec(model, third, "an edit", steps=1, references=(reference,)))


def _spec(
    model: ModelSpec,
    size: tuple[int, int],
    prompt: str,
    *,
    steps: int | None = None,
    references: tuple[RawImage, ...] = (),
) -> ImageSpec:
    return ImageSpec(
        prompt=prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=steps or model.default_steps,
        guidance_scale=model.default_guidance,
        seed=0,
        references=references,
    )


def _side(pixels: int) -> int:
    return max(64, pixels // 64 * 64)
