"""Finds the demo model `shapes`: the weights that come with the package, else random ones.

The demo has klein's architecture in small, so everything after finding it is klein's loader.
Without the trained weights it draws noise-like textures and says so in its revision.
"""

from __future__ import annotations

from pathlib import Path

from app.domain import RANDOM_REVISION
from app.engine import random_weights

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "shapes"

REVISION_TRAINED = "embedded"


def locate(scratch: Path) -> tuple[Path, str]:
    """Return the folder of the model and its revision; *scratch* takes a random one if need be."""
    if (FOLDER / "model_index.json").is_file():
        return FOLDER, REVISION_TRAINED
    folder = scratch / "shapes-random"
    return random_weights.write_random(folder, random_weights.TINY), RANDOM_REVISION
