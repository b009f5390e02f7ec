"""Adds adapters to a transformer's weights as these are read, for those that are always on.

In float32 and before quantization. Weights that are 8-bit already would lose the adapter: most of
its change is smaller than half a step between two of their values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from app.domain import Lora
from app.engine.adapters.active import read_whole
from app.engine.adapters.joined import matrix
from app.engine.adapters.layout import AdapterRefused
from app.engine.adapters.reader import Branch
from app.engine.checkpoint.files import ComponentFiles, Slot
from app.engine.checkpoint.safetensors_io import CPU
from app.errors import StartupError


def fuse(part: ComponentFiles, loras: Iterable[Lora]) -> ComponentFiles:
    """Return the transformer *part* with *loras* added to its weights.

    Raises:
        StartupError: its weights are 8-bit, or an adapter cannot be used.
    """
    if part.quantized:
        raise StartupError(
            f"KLEIN_LORA_FUSE adds to weights in bf16, and those of {part.label} are 8-bit; use "
            "the bf16 file, or KLEIN_LORAS, which leaves the weights as they are."
        )
    changes: dict[str, list[tuple[Branch, float]]] = {}
    for lora in loras:
        try:
            branches = read_whole(lora, part.linear_shapes)
        except AdapterRefused as refused:
            raise StartupError(str(refused)) from None
        except OSError as error:
            raise StartupError(
                f"The adapter {lora.name} of KLEIN_LORA_FUSE cannot be read ({error.strerror})."
            ) from None
        for module, branch in branches.items():
            changes.setdefault(f"{module}.weight", []).append((branch, lora.scale))
    fused = {
        name: replace(part.slots[name], read=partial(_read, part.slots[name], tuple(added)))
        for name, added in changes.items()
    }
    return replace(
        part,
        slots={**part.slots, **fused},
        change=json.dumps([[lora.sha256, lora.scale] for lora in loras]),
    )


def _read(
    slot: Slot, added: Sequence[tuple[Branch, float]], device: torch.device = CPU
) -> torch.Tensor:
    """Read the weight and add the branches, each at its scale: float32 [out, in]."""
    weight = slot.read(device).float()
    for branch, scale in added:
        weight += matrix(branch).to(device) * scale
    return weight
