"""From a checkpoint and a card to a memory plan: counts the bytes that `app.engine.memory` reckons
with.
"""

from __future__ import annotations

import math

import torch

from app.domain import ModelCard
from app.engine.checkpoint import Checkpoint, Part
from app.engine.compiling import Compiler
from app.engine.config import EngineConfig
from app.engine.fit import TEXT_LAYERS
from app.engine.memory import COMPILED, CONTEXT_BYTES, EAGER, GB, MemoryPlan, Weights, plan_memory
from app.engine.precision import Precision
from app.errors import StartupError

OFFLOAD = "offload"
HOST = "host"

_WORKING_BYTES = 4_000_000_000
"""What a picture of a megapixel takes in bf16, uncompiled, with the whole decode."""


def choose_plan(
    config: EngineConfig,
    card: ModelCard,
    checkpoint: Checkpoint,
    device: torch.device,
    precision: Precision,
    compiler: Compiler,
) -> MemoryPlan:
    """Decide what stays on the card.

    Raises:
        StartupError: not even the smallest plan fits.
    """
    limit = min(config.max_pixels, card.max_pixels)
    if device.type == "cpu":
        reasons = ("the model runs on the processor",)
        return MemoryPlan(HOST, reasons, 0, (limit,) * (card.max_references + 1))
    free, total = torch.cuda.mem_get_info(device)
    if config.memory_bytes is not None:
        # torch is held to this; what CUDA itself takes comes on top.
        free = min(free, config.memory_bytes + CONTEXT_BYTES)
    if precision.linears == "exact":
        return _plan_exact(config, card, checkpoint, precision, free, limit)
    weights = count_weights(checkpoint, precision)
    plan = plan_memory(
        free,
        weights,
        COMPILED if compiler.is_on else EAGER,
        default_pixels=card.default_width * card.default_height,
        limit_pixels=limit,
        max_references=card.max_references,
        asked=config.plan,
    )
    if plan is None:
        raise StartupError(
            f"The card has {free / GB:.1f} GB of {total / GB:.1f} GB free, which is too little "
            "even with the text encoder in host memory; close what else uses it."
        )
    return plan


def count_weights(checkpoint: Checkpoint, precision: Precision) -> Weights:
    """Count the bytes of each network as it will lie on the card."""
    two = precision.dtype.itemsize
    blocks = {
        name: 1 if len(slot.shape) == 2 and "blocks." in name else two
        for name, slot in checkpoint.transformer.slots.items()
    }
    layers = {
        name: 1 if len(slot.shape) == 2 else two
        for name, slot in checkpoint.encoder.slots.items()
        if name.startswith("model.layers.") and int(name.split(".")[2]) < TEXT_LAYERS[-1]
    }
    ways = {"encoder": 0, "decoder": 0}
    for name, slot in checkpoint.vae.slots.items():
        side = "encoder" if name.startswith("encoder.") else "decoder"
        ways[side] += two * math.prod(slot.shape)
    return Weights(
        transformer=_bytes(checkpoint.transformer, blocks),
        encoder=_bytes(checkpoint.encoder, layers),
        decoder=ways["decoder"],
        image_encoder=ways["encoder"],
    )


def _bytes(part: Part, sizes: dict[str, int]) -> int:
    return sum(size * math.prod(part.slots[name].shape) for name, size in sizes.items())


def _plan_exact(
    config: EngineConfig,
    card: ModelCard,
    checkpoint: Checkpoint,
    precision: Precision,
    free: int,
    limit: int,
) -> MemoryPlan:
    """All on the card, or, where that does not fit, one network at a time."""
    parts = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
    counts = (math.prod(slot.shape) for part in parts for slot in part.slots.values())
    needed = sum(counts) * precision.dtype.itemsize + _WORKING_BYTES
    sizes = (limit,) * (card.max_references + 1)
    numbers = f"all networks need {needed / GB:.1f} GB, free are {free / GB:.1f} GB"
    if config.offload in ("model", "disk"):
        return MemoryPlan(OFFLOAD, ("as asked for", numbers), needed, sizes)
    if config.offload == "none" or needed <= free:
        return MemoryPlan("resident", (numbers,), needed, sizes)
    return MemoryPlan(OFFLOAD, (f"one network at a time: {numbers}",), needed, sizes)
