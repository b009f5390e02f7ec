"""What a file says of how its picture was made: AUTOMATIC1111's text, and the same as our JSON.

ComfyUI's front end parses a text chunk named `prompt` or `workflow` as JSON and fails at any other
text, so none has either name. It makes nodes of AUTOMATIC1111's text, but only where there is a
line of the negative prompt: hence an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from app import __version__
from app.domain import ImageSpec, Lora
from app.images.formats import INFOTEXT, RECIPE
from app.service.results import describe_loras

SAMPLER = "Euler"


def write_recipe(spec: ImageSpec, model: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata of an image of *spec*; *facts* are what is known of its making besides.

    References and masks are in none of it.
    """
    width, height = spec.output_size
    size = f"{width}x{height}"
    settings = write_settings(
        steps=spec.num_inference_steps,
        guidance=spec.guidance_scale,
        seed=spec.seed,
        size=size,
        model=model,
        loras=spec.loras,
    )
    recipe = {
        "prompt": spec.prompt,
        "seed": spec.seed,
        "steps": spec.num_inference_steps,
        "guidance": spec.guidance_scale,
        "size": size,
        "model": model,
        **({"loras": describe_loras(spec.loras)} if spec.loras else {}),
        **facts,
    }
    return {
        INFOTEXT: f"{spec.prompt}\nNegative prompt: \n{settings}",
        RECIPE: json.dumps(recipe),  # in ASCII, so every reader of PNG gets it whole
    }


def write_settings(
    *, steps: int, guidance: float, seed: int, size: str, model: str, loras: Iterable[Lora]
) -> str:
    """Write the last line of AUTOMATIC1111's text."""
    hashes = write_hashes(loras)
    return (
        f"Steps: {steps}, Sampler: {SAMPLER}, CFG scale: {guidance:g}, Seed: {seed}, "
        f"Size: {size}, Model: {model}, {hashes and f'Lora hashes: {json.dumps(hashes)}, '}"
        f"Version: klein-server {__version__}"
    )


def write_hashes(loras: Iterable[Lora]) -> str:
    """Write the adapters' hashes, of which AUTOMATIC1111 shows the first twelve digits."""
    return ", ".join(f"{each.name}: {each.sha256[:12]}" for each in loras)
