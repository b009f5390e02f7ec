"""Single-file checkpoints made from a diffusers folder, as others distribute them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from app.engine.checkpoint.bfl import rules
from app.engine.quantization.linear import quantize_fp8

WEIGHTS = "diffusion_pytorch_model.safetensors"


def to_bfl(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder's transformer and name its tensors as Black Forest Labs does."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    ours = load_file(folder / "transformer" / WEIGHTS)
    theirs: dict[str, torch.Tensor] = {}
    for rule in rules(config["num_layers"], config["num_single_layers"]):
        value = ours[rule.our_name]
        if rule.is_swapped:
            value = torch.cat(value.chunk(2)[::-1])
        if rule.their_name in theirs:
            value = torch.cat([theirs[rule.their_name], value])
        theirs[rule.their_name] = value
    return theirs


def write_bf16(folder: Path, path: Path, prefix: str = "") -> Path:
    """Write the transformer of *folder* as one file in BFL's names."""
    save_file({prefix + name: value for name, value in to_bfl(folder).items()}, path)
    return path


def write_fp8(
    folder: Path, path: Path, *, input_scale: float | None = 0.05, notes: dict | None = None
) -> Path:
    """Write it in fp8 with scales, as `flux-2-klein-4b-fp8.safetensors` is."""
    tensors = {}
    layers = {}
    for name, value in to_bfl(folder).items():
        if not is_block_linear(name):
            tensors[name] = value
            continue
        module = name.removesuffix(".weight")
        tensors[name], tensors[f"{module}.weight_scale"] = quantize_fp8(value)
        if input_scale is not None:
            tensors[f"{module}.input_scale"] = torch.tensor(input_scale)
        layers[module] = {"format": "float8_e4m3fn"} | (notes or {})
    metadata = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, path, metadata={"_quantization_metadata": metadata})
    return path


def is_block_linear(name: str) -> bool:
    """Whether the published fp8 file has this weight in fp8."""
    return "_blocks." in name and name.endswith(".weight")
