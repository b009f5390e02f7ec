"""Chooses the memory plan for a checkpoint on a device.

Counts the bytes of the weights and the free GPU memory, the inputs of `app.engine.memory.planner`.
"""

from __future__ import annotations

import math

import torch

from app.domain import ModelSpec
from app.engine.checkpoint.files import Checkpoint, ComponentFiles
from app.engine.config import EngineConfig
from app.engine.memory.planner import (
    CONTEXT_BYTES,
    GB,
    MemoryPlan,
    Plan,
    Weights,
    plan_memory,
)
from app.engine.models.entry import Architecture
from app.errors import StartupError


def choose_plan(
    config: EngineConfig,
    model: ModelSpec,
    architecture: Architecture,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: torch.dtype,
    is_exact: bool,
    is_compiled: bool,
) -> MemoryPlan:
    """Choose what stays in GPU memory.

    *dtype* is that of the weights that are not quantized; *is_exact* means that none are.

    Raises:
        StartupError: not even the plan with the smallest peak fits.
    """
    limit = min(config.max_pixels, model.max_pixels)
    if device.type == "cpu":
        reasons = ("the model runs on the processor",)
        return MemoryPlan(Plan.HOST, reasons, 0, (limit,) * (model.max_references + 1))
    free, total = torch.cuda.mem_get_info(device)
    if config.memory_bytes is not None:
        # PyTorch's allocator is limited to this; the CUDA context comes on top.
        free = min(free, config.memory_bytes + CONTEXT_BYTES)
    if is_exact:
        return _plan_exact(config, model, architecture, checkpoint, dtype, free, limit)
    weights = count_weights(checkpoint, architecture, dtype)
    plan = plan_memory(
        free,
        weights,
        architecture,
        architecture.compiled if is_compiled else architecture.eager,
        default_pixels=model.default_width * model.default_height,
        limit_pixels=limit,
        max_references=model.max_references,
        asked=config.plan,
    )
    if plan is None:
        raise StartupError(
            f"The card has {free / GB:.1f} GB of {total / GB:.1f} GB free, which is too little "
            "even with the text encoder in host memory; close what else uses it."
        )
    return plan


def count_weights(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype
) -> Weights:
    """Count the bytes of each component in GPU memory: quantized weights one, others *dtype*'s."""
    two = dtype.itemsize
    blocks = {
        name: 1 if len(slot.shape) == 2 and "blocks." in name else two
        for name, slot in checkpoint.transformer.slots.items()
    }
    layers = {
        name: 1 if len(slot.shape) == 2 else two
        for name, slot in checkpoint.encoder.slots.items()
        if name.startswith("model.layers.")
        and int(name.split(".")[2]) < architecture.text_layers[-1]
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


def _bytes(part: ComponentFiles, sizes: dict[str, int]) -> int:
    return sum(size * math.prod(part.slots[name].shape) for name, size in sizes.items())


def _plan_exact(
    config: EngineConfig,
    model: ModelSpec,
    architecture: Architecture,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    free: int,
    limit: int,
) -> MemoryPlan:
    """Keep all components in GPU memory, or, where that does not fit, one at a time."""
    components = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
    counts = (math.prod(slot.shape) for part in components for slot in part.slots.values())
    needed = sum(counts) * dtype.itemsize + architecture.working_bytes
    sizes = (limit,) * (model.max_references + 1)
    numbers = f"all networks need {needed / GB:.1f} GB, free are {free / GB:.1f} GB"
    if config.offload in ("model", "disk"):
        return MemoryPlan(Plan.OFFLOAD, ("as asked for", numbers), needed, sizes)
    if config.offload == "none" or needed <= free:
        return MemoryPlan(Plan.RESIDENT, (numbers,), needed, sizes)
    return MemoryPlan(Plan.OFFLOAD, (f"one network at a time: {numbers}",), needed, sizes)
