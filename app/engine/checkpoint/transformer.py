"""The transformer in one file with BFL's names: bf16, or fp8 with scales under any known name.

A layer's scales are `.weight_scale` and `.input_scale`, or ComfyUI's older `.scale_weight` and
`.scale_input` with a marker tensor `scaled_fp8`. Its quantization metadata is in the header's
`_quantization_metadata`, or in a `.comfy_quant` tensor of JSON, possibly padded with NULs. Every
tensor of the file is accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from app.engine.checkpoint.bfl import Rule, rules
from app.engine.checkpoint.files import ComponentFiles, QuantizedLayer, Slot, slots_of
from app.engine.checkpoint.safetensors_header import HeaderError, parse_json
from app.engine.checkpoint.safetensors_io import CPU, SafetensorsFile, Tensor
from app.errors import StartupError

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALES = {
    "weight_scale": "weight",
    "scale_weight": "weight",
    "input_scale": "input",
    "scale_input": "input",
}
_NOTE_BYTES = 65_536
_SHOWN = 80


def read_transformer(file: SafetensorsFile, config: Mapping[str, Any] | None) -> ComponentFiles:
    """Describe the transformer in *file*; a *config* of None is derived from the tensors' shapes.

    Raises:
        StartupError: the file is of another model, damaged, or in an unsupported format.
    """
    if not any(name.endswith("double_blocks.0.img_attn.qkv.weight") for name in file.tensors):
        raise StartupError(
            f"{file.path.name} holds no FLUX.2 transformer in Black Forest Labs' names; "
            "give the published fp8 or bf16 file."
        )
    prefix = next(
        (each for each in _PREFIXES if any(name.startswith(each) for name in file.tensors)), ""
    )
    tensors = {name.removeprefix(prefix): each for name, each in file.tensors.items()}
    layers, plain = sort_tensors(file, tensors)
    if config is None:
        config = _config_of(file, plain)
    counts = [int(config[name]) for name in ("num_layers", "num_single_layers")]
    if max(counts) > len(tensors):
        raise _odd(file, f"it has {len(tensors)} tensors for {max(counts)} layers")
    table = rules(*counts)
    slots = {
        rule.our_name: Slot(
            rule.shape(plain[rule.their_name].shape),
            plain[rule.their_name].dtype,
            partial(_read, rule, layers.get(rule.theirs, plain[rule.their_name])),
        )
        for rule in table
        if rule.their_name in plain
    }
    unknown = sorted(set(plain) - {rule.their_name for rule in table})
    return ComponentFiles(
        file.path.name,
        config,
        slots | slots_of({name: plain[name] for name in unknown}),
        origin={rule.ours: rule.theirs for rule in table if rule.their_name in plain},
        quantized=layers,
        sources=(file.path,),
    )


def _read(rule: Rule, theirs: Tensor | QuantizedLayer, device: torch.device = CPU) -> torch.Tensor:
    return rule.take(theirs.read(device))


def sort_tensors(
    file: SafetensorsFile, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, QuantizedLayer], dict[str, Tensor]]:
    """Separate scales and quantization metadata from weights; return fp8 layers and all weights."""
    _refuse_packed(file, tensors)
    scales: dict[tuple[str, str], torch.Tensor] = {}
    notes = _header_notes(file)
    plain = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in _SCALES:
            scales[module, _SCALES[last]] = tensor.read()
        elif last == "comfy_quant":
            notes[module] = notes.get(module, {}) | _note(file, tensor)
        elif name != "scaled_fp8":
            plain[name] = tensor
    layers = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if tensor.dtype is torch.float8_e4m3fn:
            layers[module] = _layer(file, tensor, module, scales, notes)
        elif (module, "weight") in scales:
            raise _odd(file, f"{module} has a scale but is not fp8")
    if left := sorted({module for module, _ in scales} - set(layers)):
        raise _odd(file, f"there is a scale for {left[0]} but no such layer")
    return layers, plain


def _refuse_packed(file: SafetensorsFile, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for fp4: two weights in a byte, and scales of scales."""
    if any(
        name.endswith(".weight_scale_2")
        or (name.endswith(".weight") and tensor.dtype is torch.uint8)
        for name, tensor in tensors.items()
    ):
        raise StartupError(
            f"{file.path.name} holds fp4 weights, which are not supported; "
            "use the fp8 or bf16 safetensors file."
        )


def _layer(
    file: SafetensorsFile,
    tensor: Tensor,
    module: str,
    scales: Mapping[tuple[str, str], torch.Tensor],
    notes: Mapping[str, Mapping[str, Any]],
) -> QuantizedLayer:
    scale = scales.get((module, "weight"))
    if scale is None or scale.numel() not in (1, tensor.shape[0]):
        # Unscaled fp8 exists, but this model's layers would be wrong without a scale.
        raise _odd(file, f"{module} is fp8 but its weight_scale is missing or of another shape")
    note = notes.get(module, {})
    kind = note.get("format", "float8_e4m3fn")
    if kind != "float8_e4m3fn":
        raise StartupError(
            f"{file.path.name} is quantised as {kind}, which is not supported; "
            "use the fp8 or bf16 safetensors file."
        )
    return QuantizedLayer(
        weight=tensor.read,
        weight_scale=scale.float(),
        input_scale=_calibrated(scales.get((module, "input"))),
        is_full_precision=bool(note.get("full_precision_matrix_mult", False)),
    )


def _calibrated(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Return the static input scale, float32; None for the placeholder 1.0 and invalid values."""
    if scale is None or scale.numel() != 1:
        return None
    value = float(scale.float())
    return scale.float() if math.isfinite(value) and value > 0 and value != 1.0 else None


def _header_notes(file: SafetensorsFile) -> dict[str, dict[str, Any]]:
    if not (text := file.metadata.get("_quantization_metadata")):
        return {}
    longer, shorter = _PREFIXES
    try:
        return {
            name.removeprefix(longer).removeprefix(shorter): {**note}
            for name, note in parse_json(text)["layers"].items()
        }
    except (HeaderError, AttributeError, KeyError, TypeError, ValueError):
        raise _odd(file, "its _quantization_metadata cannot be read") from None


def _note(file: SafetensorsFile, tensor: Tensor) -> dict[str, Any]:
    if tensor.dtype is not torch.uint8 or tensor.size_bytes > _NOTE_BYTES:
        raise _odd(file, f"{tensor.name[:_SHOWN]} is no note")
    text = bytes(tensor.read().reshape(-1).tolist()).strip(b"\0 ")
    try:
        note = parse_json(text) if text else {}
    except HeaderError:
        note = None
    if not isinstance(note, dict):
        raise _odd(file, f"{tensor.name[:_SHOWN]} cannot be read")
    return note


def _config_of(file: SafetensorsFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Derive the transformer's config from the shapes of the weights."""
    if any(name.startswith("guidance_in") for name in tensors):
        raise StartupError(
            f"{file.path.name} is FLUX.2 [dev], which is another model; give FLUX.2 klein 4B."
        )
    try:
        width, channels = tensors["img_in.weight"].shape
        size = tensors["single_blocks.0.norm.query_norm.scale"].shape[0]
        joined = tensors["single_blocks.0.linear1.weight"].shape[0]
        return {
            "in_channels": channels,
            "num_layers": _count(tensors, "double_blocks"),
            "num_single_layers": _count(tensors, "single_blocks"),
            "attention_head_dim": size,
            "num_attention_heads": width // size,
            "joint_attention_dim": tensors["txt_in.weight"].shape[1],
            "timestep_guidance_channels": tensors["time_in.in_layer.weight"].shape[1],
            "mlp_ratio": (joined - 3 * width) / (2 * width),
            "axes_dims_rope": [size // 4] * 4,
            "guidance_embeds": False,
        }
    except KeyError as missing:
        raise _odd(file, f"it lacks {missing}") from None


def _count(tensors: Mapping[str, Tensor], group: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith(f"{group}."))


def _odd(file: SafetensorsFile, what: str) -> StartupError:
    return StartupError(
        f"{file.path.name} cannot be used: {what}; it belongs to another model or is damaged."
    )
