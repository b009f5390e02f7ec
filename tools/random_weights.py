"""Checkpoints of klein's shape with random weights, for tests and benchmarks.

Speed and memory do not depend on the weights' values, and no published weights may be at hand; so
the same writer makes a tiny model in a second and the full one for a measurement. It knows the
diffusers layout and the classes, but not how they are loaded again.

Every matrix is drawn with variance 1 / fan-in, so that the streams stay near unit size through all
blocks and the pictures are textures instead of a clipped constant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from app.engine.models.flux2_klein import FLUX2_KLEIN_4B

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""What Qwen's own template says for one user turn without thinking."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass(frozen=True)
class Architecture:
    """The constructor arguments of the three networks."""

    transformer: dict[str, Any]
    encoder: dict[str, Any]
    vae: dict[str, Any]


TINY = Architecture(
    transformer={
        "in_channels": 32,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 96,
        "timestep_guidance_channels": 64,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": False,
    },
    encoder={
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 28,  # one more than is read: the trimming has something to cut
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    vae={"block_out_channels": (8, 8, 16, 16), "latent_channels": 8, "norm_num_groups": 8},
)

FULL = Architecture(
    transformer={
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    encoder={
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    vae={},
)


def write_random(
    folder: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    is_distilled: bool = True,
    save_transformer: Callable[[dict[str, torch.Tensor], Path], None] | None = None,
) -> Path:
    """Write a complete diffusers folder; equal arguments give equal files on one kind of device.

    *save_transformer* gets the transformer's tensors and its folder, instead of diffusers' file.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**architecture.transformer)
        encoder = Qwen3ForCausalLM(Qwen3Config(**architecture.encoder))
        vae = AutoencoderKLFlux2(**architecture.vae)
    weights = "diffusion_pytorch_model.safetensors"
    for name, model, file in (
        ("transformer", transformer, weights),
        ("text_encoder", encoder, "model.safetensors"),
        ("vae", vae, weights),
    ):
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        tensors = _draw(model, generator, dtype)
        if save_transformer is not None and model is transformer:
            save_transformer(tensors, part)
            continue
        save_file(tensors, part / file, metadata={"format": "pt"})
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    encoder.config.architectures = ["Qwen3ForCausalLM"]
    encoder.config.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**FLUX2_KLEIN_4B.scheduler).save_config(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(_index(is_distilled), indent=2) + "\n")
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: a token per byte, and Qwen's special ones."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(_SPECIAL)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=list(_SPECIAL[1:3])
    )
    tokenizer.add_tokens(list(_SPECIAL[3:]))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _draw(
    model: torch.nn.Module, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Draw every tensor of *model*, in the order of its names; tied weights are left out, as on
    disk.
    """
    names = set(model.state_dict()) - {"lm_head.weight"}
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    drawn = {}
    for name, like in shapes.items():
        if not like.is_floating_point():
            drawn[name] = torch.zeros(like.shape, dtype=like.dtype)
            continue
        value = torch.randn(like.shape, generator=generator, device=generator.device)
        drawn[name] = _scale(name, value).to(dtype).cpu()
    return drawn


def _scale(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.endswith("running_var"):
        return value.abs() + 0.5
    if name.endswith("running_mean"):
        return value * 0.1
    if value.ndim == 1:
        return value * 0.1 + (0.0 if name.endswith("bias") else 1.0)
    gain = 0.3 if name.startswith("decoder.conv_out") else 1.0
    return value * (gain / math.sqrt(value[0].numel()))


def _index(is_distilled: bool) -> dict[str, Any]:
    return {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": is_distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
