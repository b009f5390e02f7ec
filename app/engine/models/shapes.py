"""The demo model `shapes`, whose weights are part of the package.

It is a small model of klein's architecture, so klein's loader loads it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.domain import ModelSpec
from app.engine.models.entry import ModelEntry
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B

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
        size_multiple=FLUX2_KLEIN_4B.token_side,
        note=(
            "It draws coloured shapes only: one or two of circle, square, triangle, diamond, star, "
            "cross, heart and ring, with colour, size, place and background, such as 'a red circle "
            "on a blue background'."
        ),
    ),
    # Its sequences are no longer than klein's, and its layers narrower: klein's rates are enough.
    architecture=replace(
        FLUX2_KLEIN_4B,
        heads=5,
        head_size=32,
        mlp_width=320,
        double_blocks=2,
        single_blocks=6,
        timestep_channels=64,
        text_width=64,
        text_mlp_width=96,
        text_query_width=4 * 16,
        text_key_width=2 * 16,
        prompt_tokens=64,
        latent_channels=16,
        decoder_widths=(64, 48, 32, 16),
        decoder_blocks=2,
    ),
    folder=Path(__file__).resolve().parent / "data" / "shapes",
)
