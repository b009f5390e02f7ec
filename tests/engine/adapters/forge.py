"""Writes one adapter in every layout that people have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from app.engine.adapters.layout import Shapes
from app.engine.adapters.names import count_blocks
from app.engine.checkpoint.bfl import Rule, rules

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A and B of each module, by diffusers' names."""

DOUBLES, SINGLES = 1, 2
_WIDTH, _MLP, _JOINT, _CHANNELS, _TIME = 24, 36, 20, 12, 16


def model_shapes() -> dict[str, tuple[int, int]]:
    """Return the linear layers of a model of one double and two single blocks."""
    square = (_WIDTH, _WIDTH)
    found = {
        "x_embedder": (_WIDTH, _CHANNELS),
        "context_embedder": (_WIDTH, _JOINT),
        "time_guidance_embed.timestep_embedder.linear_1": (_WIDTH, _TIME),
        "time_guidance_embed.timestep_embedder.linear_2": square,
        "double_stream_modulation_img.linear": (6 * _WIDTH, _WIDTH),
        "double_stream_modulation_txt.linear": (6 * _WIDTH, _WIDTH),
        "single_stream_modulation.linear": (3 * _WIDTH, _WIDTH),
        "norm_out.linear": (2 * _WIDTH, _WIDTH),
        "proj_out": (_CHANNELS, _WIDTH),
    }
    for block in range(DOUBLES):
        stem = f"transformer_blocks.{block}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out"):
            found[f"{stem}.attn.{name}"] = square
        for name in "qkv":
            found[f"{stem}.attn.add_{name}_proj"] = square
        for name in ("ff", "ff_context"):
            found[f"{stem}.{name}.linear_in"] = (2 * _MLP, _WIDTH)
            found[f"{stem}.{name}.linear_out"] = (_WIDTH, _MLP)
    for block in range(SINGLES):
        stem = f"single_transformer_blocks.{block}.attn"
        found[f"{stem}.to_qkv_mlp_proj"] = (3 * _WIDTH + 2 * _MLP, _WIDTH)
        found[f"{stem}.to_out"] = (_WIDTH, _WIDTH + _MLP)
    return found


def draw(
    shapes: Shapes, rank: int = 4, seed: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw an adapter of *rank* for every layer; query, key and value share A, as when fused."""
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shared: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in shapes.items():
        down = torch.randn(rank, columns, generator=generator)
        if name.endswith(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")):
            group = name.rpartition(".")[0] + str("add" in name)
            down = shared.setdefault(group, down)
        pairs[name] = (down, torch.randn(rows, rank, generator=generator) / rank)
    return pairs


def _theirs(pairs: Pairs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return *pairs* under Black Forest Labs' names, query, key and value fused."""
    groups: dict[str, list[Rule]] = {}
    for rule in rules(*count_blocks(pairs)):
        if not rule.is_norm and rule.ours in pairs:
            groups.setdefault(rule.theirs, []).append(rule)
    found = {}
    for theirs, parts in groups.items():
        up = torch.cat([pairs[rule.ours][1] for rule in parts])
        if parts[0].is_swapped:
            up = torch.cat(up.chunk(2)[::-1])
        found[theirs] = (pairs[parts[0].ours][0], up)
    return found


def _keys(
    prefix: str, words: tuple[str, str], pairs: Pairs, rename: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{rename(name)}.{word}.weight": tensor.contiguous()
        for name, both in pairs.items()
        for word, tensor in zip(words, both, strict=True)
    }


_PEFT, _KOHYA = ("lora_A", "lora_B"), ("lora_down", "lora_up")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _alphas(prefix: str, pairs: Pairs, alpha: float, rename: Callable[[str], str] = str):
    return {f"{prefix}{rename(name)}.alpha": torch.tensor(alpha) for name in pairs}


def layouts(
    pairs: Pairs, alpha: float
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Return tensors and metadata of the adapter *pairs* with *alpha* in every layout."""
    theirs = _theirs(pairs)
    alone = {name: pair for name, pair in pairs.items() if name.startswith("transformer_blocks.")}
    rank = len(next(iter(pairs.values()))[0])
    config = {"lora_alpha": alpha, "r": rank, "target_modules": list(pairs)}
    note = {"lora_adapter_metadata": json.dumps({f"transformer.{n}": v for n, v in config.items()})}
    plain = _keys("transformer.", _PEFT, pairs)
    return {
        "PEFT, alpha in the metadata": (plain, note),
        "PEFT, alpha by pattern": (
            plain,
            {
                "lora_adapter_metadata": json.dumps(
                    {
                        "transformer.lora_alpha": 77,
                        "transformer.alpha_pattern": dict.fromkeys(pairs, alpha),
                    }
                )
            },
        ),
        "PEFT, alpha as a tensor": (plain | _alphas("transformer.", pairs, alpha), {}),
        "base_model.model": (_keys("base_model.model.", _PEFT, pairs), note),
        "PEFT, named": (
            _keys("base_model.model.", ("lora_A.default", "lora_B.default"), pairs),
            note,
        ),
        "bare diffusers names": (_keys("", _PEFT, pairs), note),
        "ai-toolkit": (
            _keys("diffusion_model.", _PEFT, theirs) | _alphas("diffusion_model.", theirs, alpha),
            {},
        ),
        "diffusion_model, down and up": (
            _keys("diffusion_model.", _KOHYA, theirs) | _alphas("diffusion_model.", theirs, alpha),
            {},
        ),
        "bare BFL names": (_keys("", _PEFT, theirs) | _alphas("", theirs, alpha), {}),
        "kohya": (
            _keys("lora_unet_", _KOHYA, theirs, _flat)
            | _alphas("lora_unet_", theirs, alpha, _flat),
            {},
        ),
        "OneTrainer": (
            _keys("lora_transformer_", _KOHYA, pairs, _flat)
            | _alphas("lora_transformer_", pairs, alpha, _flat),
            {},
        ),
        "sformer_blocks": (
            _keys("diffusion_model.", _PEFT, {n.removeprefix("tran"): p for n, p in alone.items()})
            | _keys("", _PEFT, {n: p for n, p in pairs.items() if n not in alone}),
            note,
        ),
    }


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write an adapter to *path*."""
    save_file({name: each.clone() for name, each in tensors.items()}, path, dict(metadata))
    return path
