"""The demo model `shapes`, whose weights are part of the package.

It is a small model of klein's architecture, so klein's loader loads it.
"""

from __future__ import annotations

from pathlib import Path

from app.domain import ModelSpec
from app.engine.models.entry import ModelEntry
from app.errors import StartupError

FOLDER = Path(__file__).resolve().parent / "data" / "shapes"

REVISION = "embedded"


def locate() -> Path:
    """Return the folder of the model's files.

    Raises:
        StartupError: the installation lacks it.
    """
    if not (FOLDER / "model_index.json").is_file():
        raise StartupError(
            "The demo model shapes is missing from this installation; install the package again."
        )
    return FOLDER


SHAPES = ModelEntry(
    spec=ModelSpec(
        id="shapes",
        title="shapes, the embedded demo model",
        hub_id=None,
        owned_by="klein-server",
        created=1_795_305_600,
        licence="Apache-2.0",
        default_width=256,
        default_height=256,
        default_steps=4,
        max_steps=50,
        default_guidance=1.0,
        max_guidance=1.0,
        min_side=128,
        max_side=512,
        max_pixels=262_144,
        max_references=4,
        max_sequence_length=64,
        note=(
            "It draws coloured shapes only: one or two of circle, square, triangle, diamond, star, "
            "cross, heart and ring, with colour, size, place and background, such as 'a red circle "
            "on a blue background'."
        ),
    ),
)
