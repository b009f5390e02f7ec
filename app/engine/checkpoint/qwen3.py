"""Qwen3 in one file, as ComfyUI distributes it: transformers' names, bf16 or fp8 with scales."""

from __future__ import annotations

from typing import Any

from app.engine.checkpoint.files import ComponentFiles, Slot
from app.engine.checkpoint.safetensors_io import SafetensorsFile, Tensor
from app.engine.checkpoint.transformer import sort_tensors
from app.errors import StartupError


def read_encoder(file: SafetensorsFile) -> ComponentFiles:
    """Describe the text encoder in *file*; its config is derived from the tensors' shapes.

    Raises:
        StartupError: the file is no Qwen3.
    """
    layers, plain = sort_tensors(file, file.tensors)
    slots = {
        name: Slot(
            tensor.shape, tensor.dtype, layers.get(name.removesuffix(".weight"), tensor).read
        )
        for name, tensor in plain.items()
    }
    return ComponentFiles(file.path.name, _config_of(file, plain), slots, sources=(file.path,))


def _config_of(file: SafetensorsFile, tensors: dict[str, Tensor]) -> dict[str, Any]:
    first = "model.layers.0."
    try:
        size = tensors[f"{first}self_attn.q_norm.weight"].shape[0]
        vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
        numbers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
        if numbers != set(range(len(numbers))):
            raise ValueError("layers")
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": tensors[f"{first}mlp.up_proj.weight"].shape[0],
            "num_hidden_layers": max(numbers) + 1,
            "num_attention_heads": tensors[f"{first}self_attn.q_proj.weight"].shape[0] // size,
            "num_key_value_heads": tensors[f"{first}self_attn.k_proj.weight"].shape[0] // size,
            "head_dim": size,
            "max_position_embeddings": 40_960,
            # What the shapes do not determine, as in Qwen3-4B's published config.
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }
    except (KeyError, ValueError):
        raise StartupError(
            f"{file.path.name} is no Qwen3 in Hugging Face's names; use qwen_3_4b.safetensors."
        ) from None
