"""Finds the demo model `shapes`, whose weights come with the package.

The demo has klein's architecture in small, so everything after finding it is klein's loader.
"""

from __future__ import annotations

from pathlib import Path

from app.errors import StartupError

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "shapes"

REVISION = "embedded"


def locate() -> Path:
    """Return the folder of the model.

    Raises:
        StartupError: the package was installed without it.
    """
    if not (FOLDER / "model_index.json").is_file():
        raise StartupError(
            "The demo model shapes is missing from this installation; install the package again."
        )
    return FOLDER
