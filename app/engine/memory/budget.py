"""Chooses the memory plan for a checkpoint on a device.

Counts the bytes of the weights and the free GPU memory, the inputs of `app.engine.memory.planner`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from app.domain import ModelSpec
from app.engine.adapters.shapes import slot_bytes
from app.engine.checkpoint.files import Checkpoint, Slot
from app.engine.config import EngineConfig
from app.engine.memory.planner import (
    CONTEXT_BYTES,
    GB,
    MemoryPlan,
    Plan,
    Weights,
    plan_exact,
    plan_memory,
)
from app.engine.models.entry import Architecture
from app.engine.quantization.select import Precision
from app.errors import StartupError


def choose_plan(
    config: EngineConfig,
    model: ModelSpec,
    architecture: Architecture,
    checkpoint: Checkpoint,
    device: torch.device,
    precision: Precision,
    *,
    has_kernels: bool,
) -> MemoryPlan:
    """Choose what stays in GPU memory.

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
    adapters = slot_bytes(checkpoint.transformer.linear_shapes, config.lora_rank)
    if precision.linears.is_exact:
        return plan_exact(
            free,
            count_exact(checkpoint, precision) + adapters,
            architecture.working_bytes,
            limit_pixels=limit,
            max_references=model.max_references,
            offload=config.offload,
        )
    plan = plan_memory(
        free,
        replace(count_weights(checkpoint, architecture, precision), adapters=adapters),
        architecture,
        architecture.with_kernels if has_kernels else architecture.without_kernels,
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
    checkpoint: Checkpoint, architecture: Architecture, precision: Precision
) -> Weights:
    """Count the bytes of each component in GPU memory, the large linear layers quantized."""
    rest = precision.dtype.itemsize
    layers = {
        name: slot
        for name, slot in checkpoint.encoder.slots.items()
        if name.startswith("model.layers.")
        and int(name.split(".")[2]) < architecture.text_layers[-1]
    }
    vae = checkpoint.vae.slots.items()
    image_encoder = {name: slot for name, slot in vae if name.startswith("encoder.")}
    decoder = {name: slot for name, slot in vae if name not in image_encoder}
    return Weights(
        transformer=_bytes(
            checkpoint.transformer.slots, rest, precision.linears.weight_bytes, "blocks."
        ),
        encoder=_bytes(layers, rest, precision.encoder_linears.weight_bytes),
        decoder=_bytes(decoder, rest),
        image_encoder=_bytes(image_encoder, rest),
    )


def count_exact(checkpoint: Checkpoint, precision: Precision) -> int:
    """Count the bytes of all weights where none is quantized."""
    return sum(
        _bytes(part.slots, precision.dtype.itemsize)
        for part in (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
    )


def _bytes(
    slots: Mapping[str, Slot], rest: float, matrix: float | None = None, word: str = ""
) -> int:
    """Sum *slots* up: *matrix* bytes a weight for matrices with *word* in their name, else *rest*.

    A *matrix* of None is the *rest* too.
    """
    large = rest if matrix is None else matrix
    return math.ceil(
        sum(
            (large if len(slot.shape) == 2 and word in name else rest) * math.prod(slot.shape)
            for name, slot in slots.items()
        )
    )
