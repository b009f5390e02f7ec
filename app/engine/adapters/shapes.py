"""The linear layers of a model's transformer, as diffusers names them, without torch."""

from __future__ import annotations

from app.engine.adapters.layout import Shapes, joined_name
from app.engine.models.entry import Architecture

_FACTOR_BYTES = 2
"""Of a number of A or B in the slots, in bf16; A takes half where its layer's input is in fp8."""


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return [out, in] of each linear layer of diffusers' `Flux2Transformer2DModel` by its module.

    Those of a model as it is published; a loaded one tells its own (`ModelInfo.linear_shapes`).
    """
    width, mlp = architecture.width, architecture.mlp_width
    channels = (
        architecture.latent_channels * (architecture.token_side // architecture.latent_side) ** 2
    )
    square = (width, width)
    shapes = {
        "time_guidance_embed.timestep_embedder.linear_1": (width, architecture.timestep_channels),
        "time_guidance_embed.timestep_embedder.linear_2": square,
        "double_stream_modulation_img.linear": (6 * width, width),
        "double_stream_modulation_txt.linear": (6 * width, width),
        "single_stream_modulation.linear": (3 * width, width),
        "x_embedder": (width, channels),
        "context_embedder": (width, len(architecture.text_layers) * architecture.text_width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (channels, width),
    }
    for number in range(architecture.double_blocks):
        stem = f"transformer_blocks.{number}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out"):
            shapes[f"{stem}.attn.{name}"] = square
        for name in "qkv":
            shapes[f"{stem}.attn.add_{name}_proj"] = square
        for name in ("ff", "ff_context"):
            shapes[f"{stem}.{name}.linear_in"] = (2 * mlp, width)
            shapes[f"{stem}.{name}.linear_out"] = (width, mlp)
    for number in range(architecture.single_blocks):
        stem = f"single_transformer_blocks.{number}.attn"
        shapes[f"{stem}.to_qkv_mlp_proj"] = (3 * width + 2 * mlp, width)
        shapes[f"{stem}.to_out"] = (width, width + mlp)
    return shapes


def slot_bytes(shapes: Shapes, rank: int) -> int:
    """Return what adapters of *rank* on every layer take on the GPU, at most, in bytes.

    A is [rank, in] and B [out, rank] for each joined layer: 98 MB for rank 32 of klein.
    """
    sides = {joined_name(module): columns for module, (_, columns) in shapes.items()}
    return _FACTOR_BYTES * rank * (sum(sides.values()) + sum(rows for rows, _ in shapes.values()))
