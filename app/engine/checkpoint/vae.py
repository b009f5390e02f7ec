"""FLUX.2's VAE in one file, with diffusers' names (ComfyUI's file) or BFL's (`ae.safetensors`).

The small decoder (same encoder, fewer channels) needs no flag: channel counts come from the
weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from app.engine.checkpoint.files import ComponentFiles, Slot, slots_of
from app.engine.checkpoint.safetensors_io import CPU, SafetensorsFile, Tensor
from app.errors import StartupError

_WORDS = (
    (r"^encoder\.quant_conv", "quant_conv"),
    (r"^decoder\.post_quant_conv", "post_quant_conv"),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
_GROUPS = 32


def read_vae(file: SafetensorsFile) -> ComponentFiles:
    """Describe the VAE in *file*, with diffusers' or BFL's names.

    Raises:
        StartupError: the file has no VAE of FLUX.2.
    """
    slots = slots_of(file.tensors)
    if any(name.startswith("decoder.up.") for name in slots):
        slots = _from_bfl(file.tensors)
    return ComponentFiles(file.path.name, _config_of(file, slots), slots, sources=(file.path,))


def _from_bfl(tensors: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Rename BFL's tensors; its attention projections are stored as 1x1 convolutions."""
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if ".up." in name)
    slots = {}
    for name, tensor in tensors.items():
        ours = name
        for pattern, words in _WORDS:
            ours = re.sub(pattern, words, ours)
        # BFL numbers the decoder's blocks from the pixels, diffusers from the latents.
        ours = re.sub(
            r"up_blocks\.(\d+)", lambda found: f"up_blocks.{blocks - 1 - int(found[1])}", ours
        )
        if ".attentions." in ours and len(tensor.shape) == 4:
            slots[ours] = Slot(tensor.shape[:2], tensor.dtype, partial(_flat, tensor))
        else:
            slots[ours] = Slot(tensor.shape, tensor.dtype, tensor.read)
    return slots


def _flat(tensor: Tensor, device: torch.device = CPU) -> torch.Tensor:
    return tensor.read(device)[:, :, 0, 0]


def _config_of(file: SafetensorsFile, slots: Mapping[str, Slot]) -> dict[str, Any]:
    try:
        down = _widths(slots, "encoder.down_blocks")
        up = _widths(slots, "decoder.up_blocks")[::-1]
        return {
            "block_out_channels": down,
            "decoder_block_out_channels": up if up != down else None,
            "latent_channels": slots["decoder.conv_in.weight"].shape[1],
            "norm_num_groups": min(_GROUPS, *down, *up),
        }
    except (KeyError, ValueError):
        raise StartupError(
            f"{file.path.name} is no VAE of FLUX.2; use flux2-vae.safetensors."
        ) from None


def _widths(slots: Mapping[str, Slot], group: str) -> list[int]:
    count = 1 + max(int(name.split(".")[2]) for name in slots if name.startswith(group))
    return [slots[f"{group}.{n}.resnets.0.conv1.weight"].shape[0] for n in range(count)]
