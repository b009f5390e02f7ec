"""The names under which adapter files know a layer, and the parts of an adapter's key.

A key is a prefix, a layer and a tensor: `diffusion_model.` `double_blocks.0.img_attn.qkv`
`.lora_A.weight`. A layer has diffusers' or Black Forest Labs' name, with dots, or with underscores
for each dot (kohya's scripts, OneTrainer, LyCORIS). Whole names are matched, never substrings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from app.engine.checkpoint.bfl import rules

_DOTTED = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
)
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_TEXT_ENCODER = ("text_encoder", "text_model.", "lora_te", "te1_", "clip_l.", "model.layers.")

_TENSORS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "lokr_w1": "w1",
    "lokr_w1_a": "w1_a",
    "lokr_w1_b": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
}
"""What a file calls a tensor of a layer, and what is meant."""

_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_magnitude_vector.default.weight": "DoRA",
    "hada_w1_a": "LoHa",
    "hada_w1_b": "LoHa",
    "hada_w2_a": "LoHa",
    "hada_w2_b": "LoHa",
    "hada_t1": "LoHa",
    "hada_t2": "LoHa",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R.weight": "OFT",
    "oft_R.default.weight": "OFT",
    "boft_R": "OFT",
    "lokr_t2": "LoKr of convolutions",
    "lora_mid.weight": "LoCon",
    "lora_B.bias": "LoRA with a bias",
    "diff": "whole differences of weights (.diff)",
    "diff_b": "whole differences of weights (.diff)",
    "set_weight": "whole weights (.set_weight)",
}
"""Tensors of kinds of adapters that are not supported, and their names."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a layer of a file lies in diffusers' modules.

    *modules* are the modules whose outputs it holds one after the other: three for a fused query,
    key and value, else one.
    """

    modules: tuple[str, ...]
    is_swapped: bool = False
    """Whether the halves of its outputs are swapped in the file."""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """An adapter's key, taken apart; *tensor* is a value of the table of tensors."""

    layer: str
    tensor: str


class Refused(Exception):
    """A key is of a kind that is not supported; the message completes "it holds "."""


def targets_of(modules: Iterable[str]) -> dict[str, Target]:
    """Map every name of a linear layer to its target, for a model of these *modules*."""
    return targets(*count_blocks(modules))


def count_blocks(modules: Iterable[str]) -> tuple[int, int]:
    """Count the double and the single blocks that *modules* belong to."""
    blocks = {tuple(name.split(".")[:2]) for name in modules}
    doubles, singles = (
        sum(stem == kind for stem, *_ in blocks)
        for kind in ("transformer_blocks", "single_transformer_blocks")
    )
    return doubles, singles


def targets(doubles: int, singles: int) -> dict[str, Target]:
    """Map every name of a linear layer to its target.

    For a model of *doubles* double and *singles* single blocks.
    """
    found: dict[str, Target] = {}
    thirds: dict[str, list[str]] = {}
    for rule in rules(doubles, singles):
        if rule.is_norm:
            continue
        found[rule.ours] = Target((rule.ours,))
        if rule.third is None:
            found[rule.theirs] = Target((rule.ours,), rule.is_swapped)
        else:
            thirds.setdefault(rule.theirs, []).append(rule.ours)
    for theirs, ours in thirds.items():
        found[theirs] = found[_fused(ours[0])] = Target(tuple(ours))
    return found | {name.replace(".", "_"): target for name, target in found.items()}


def _fused(query: str) -> str:
    """Return diffusers' name of a query's layer after its `fuse_qkv_projections`."""
    block, _, name = query.rpartition(".")
    return f"{block}.{'to_qkv' if name == 'to_q' else 'to_added_qkv'}"


def parse(key: str) -> Key:
    """Take *key* apart.

    Raises:
        Refused: it belongs to another kind of adapter, to a text encoder, or to no adapter.
    """
    if key.startswith(_TEXT_ENCODER):
        raise Refused("layers of a text encoder")
    for name, kind in _REFUSED.items():
        if key.endswith(f".{name}"):
            raise Refused(kind)
    # The longest first: "w1_a" before what it ends with.
    for name, tensor in _TENSORS.items():
        if key.endswith(f".{name}"):
            return Key(_layer(key.removesuffix(f".{name}")), tensor)
    raise Refused(f"the key {key[:80]}")


def _layer(path: str) -> str:
    """Return the layer's own name."""
    for prefix in _UNDERSCORED:
        if path.startswith(prefix) and "." not in path:
            return path.removeprefix(prefix)
    for prefix in _DOTTED:
        path = path.removeprefix(prefix)
    # An exporter cut sixteen characters off "transformer.transformer_blocks".
    return f"tran{path}" if path.startswith("sformer_blocks.") else path


def other_model(layers: Mapping[str, object]) -> str:
    """Guess from *layers*, which this model lacks, whose they are; empty where nothing tells."""
    words = " ".join(layers)
    for marks, model in (
        (("input_blocks", "down_blocks", "up_blocks", "output_blocks"), "Stable Diffusion"),
        (("joint_blocks", "context_block"), "Stable Diffusion 3"),
        (("img_mod", "img_mlp_net", "norm1_linear", "norm1.linear"), "FLUX.1"),
        (("noise_refiner", "context_refiner"), "Z-Image"),
        (("self_attn", "cross_attn"), "Wan"),
    ):
        if any(mark in words for mark in marks):
            return model
    return ""
