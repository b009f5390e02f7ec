"""The images generated before the service is ready: a check of the model, and of first calls' cost.

They are checked: an image of one colour, or with a value that is not finite, ends the start.

On a GPU an image at the default size has its kernels compiled, or loaded, and its convolutions
planned; a small edit does the same for the VAE encoder, and its text pass becomes a CUDA graph; one
more of the default size is timed. Kernels are compiled for no size, so other sizes need no image.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from app.domain import Generated, ImageSpec, LoadProgress, Lora, ModelSpec, RawImage, WorkerStage
from app.engine import error_mapping
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
    trial: AbstractContextManager[tuple[Lora, ...]],
) -> float:
    """Generate images until all is warm; return the seconds of one at the default size.

    On a GPU the adapters that *trial* yields take part in one of them.

    Raises:
        StartupError: the GPU has no memory even for a small image, or the output is not an image.
    """
    if device.type == "cpu":
        return _warm_processor(model, make, on_progress)
    on_progress(LoadProgress(WorkerStage.WARM_UP, 0.0, "the default size"))
    size = _make_first(model, make)
    on_progress(LoadProgress(WorkerStage.WARM_UP, 0.5, "an edit"))
    with trial as loras:
        _make_edit(model, size, make, loras)
    # Free the fragmented memory that trials of kernels and the other size left cached.
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


def _make_edit(
    model: ModelSpec, size: tuple[int, int], make: Make, loras: tuple[Lora, ...]
) -> None:
    """Encode a small reference for an image of a quarter of *size*, in one step with *loras*."""
    reference = RawImage(128, 192, bytes(128 * 192 * 3))
    small = (_side(size[0] // 2), _side(size[1] // 2))
    make(_spec(model, small, "an edit", steps=1, references=(reference,), loras=loras))


def _spec(
    model: ModelSpec,
    size: tuple[int, int],
    prompt: str,
    *,
    steps: int | None = None,
    references: tuple[RawImage, ...] = (),
    loras: tuple[Lora, ...] = (),
) -> ImageSpec:
    return ImageSpec(
        prompt=prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=steps or model.default_steps,
        guidance_scale=model.default_guidance,
        seed=0,
        references=references,
        loras=loras,
    )


def _side(pixels: int) -> int:
    return max(64, pixels // 64 * 64)
