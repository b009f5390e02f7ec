"""Checkpoints normalised: components with a config and weights under diffusers' names.

A component lists its tensors before any is read, so missing, extra or wrongly shaped tensors are
errors that name them, and none is ignored silently. Configs are read as data; one that refers to
code is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.engine.checkpoint.safetensors_header import MAX_BYTES
from app.engine.checkpoint.safetensors_io import CPU, Read, Tensor
from app.errors import StartupError

_CODE_KEYS = ("auto_map", "_attn_implementation_internal")
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Slot:
    """One weight under diffusers' name: its shape, dtype, and the function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One fp8 (e4m3) layer as stored in the file; *weight_scale* has one element or one per row."""

    weight: Read
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    is_full_precision: bool
    """Whether the file requires a matmul in full precision for this layer."""

    def read(self, device: torch.device = CPU) -> torch.Tensor:
        """Return the dequantized weight, float32 [out, in]."""
        scale = self.weight_scale.float().to(device)
        if scale.numel() > 1:
            scale = scale.reshape(-1, 1)
        return self.weight(device).float() * scale


@dataclass(frozen=True, slots=True)
class ComponentFiles:
    """One component on disk; *label* is its file or folder in messages."""

    label: str
    config: Mapping[str, Any]
    slots: Mapping[str, Slot]
    origin: Mapping[str, str] = field(default_factory=dict)
    """The file's own name of each module, where it differs from diffusers'."""
    quantized: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    """fp8 layers by the file's own module name."""
    sources: tuple[Path, ...] = ()
    """The files of its weights."""
    change: str = ""
    """What was done to the weights since they were read, for a cache of what is made of them."""

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear layer of a transformer by its module: its only matrices."""
        return {
            name.removesuffix(".weight"): (slot.shape[0], slot.shape[1])
            for name, slot in self.slots.items()
            if len(slot.shape) == 2
        }

    def check(self, expected: Mapping[str, torch.Size], optional: Iterable[str] = ()) -> None:
        """Check that there are exactly the *expected* tensors, in their shapes.

        Raises:
            StartupError: tensors are missing, unknown or of the wrong shape.
        """
        missing = sorted(set(expected) - set(self.slots))
        extra = sorted(set(self.slots) - set(expected) - set(optional))
        wrong = [
            f"{name} {list(self.slots[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self.slots and self.slots[name].shape != tuple(shape)
        ]
        for what, names in (
            ("lacks tensors that are needed", missing),
            ("has tensors that the model does not know", extra),
            ("has tensors of the wrong shape", wrong),
        ):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                raise StartupError(
                    f"The file of {self.label} {what}: {', '.join(names[:_NAMED])}{more}; "
                    "it belongs to another model or is damaged."
                )


@dataclass(slots=True)
class Checkpoint:
    """All components of one model, with their open files; *layout* describes the source."""

    layout: str
    transformer: ComponentFiles
    encoder: ComponentFiles
    vae: ComponentFiles
    scheduler: Mapping[str, Any]
    tokenizer: Path
    is_distilled: bool | None
    files: ExitStack = field(default_factory=ExitStack, repr=False)
    """Closes every file."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON config.

    Raises:
        StartupError: it is missing, not a JSON object, or refers to code or an implementation.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(path.name)
        config = json.loads(path.read_text())
        is_code = next((key for key in _CODE_KEYS if key in json.dumps(config)), None)
    except FileNotFoundError:
        raise StartupError(
            f"{path.parent.name}/{path.name} is missing; download the model again."
        ) from None
    except (ValueError, RecursionError):
        raise StartupError(
            f"{path.parent.name}/{path.name} is not valid JSON; download the model again."
        ) from None
    if is_code is not None:
        raise StartupError(
            f"{path.parent.name}/{path.name} has the entry {is_code}, which would run code of the "
            "checkpoint's own; remove it if you trust the rest of the file."
        )
    if not isinstance(config, dict):
        raise StartupError(f"{path.parent.name}/{path.name} is no table of settings.")
    return config


def slots_of(tensors: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Describe tensors that already have diffusers' names."""
    return {name: Slot(tensor.shape, tensor.dtype, tensor.read) for name, tensor in tensors.items()}
