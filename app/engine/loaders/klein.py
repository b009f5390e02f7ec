"""Builds the pipeline's parts from a checkpoint.

The networks are made without weights (on torch's meta device) and filled tensor by tensor, so that
no weight is ever held twice and a missing one cannot pass for a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from app.domain import LoadProgress
from app.engine.checkpoint import Checkpoint, Part, read_config
from app.engine.fit import TEXT_LAYERS
from app.engine.network import RopeTable
from app.engine.parts import Parts
from app.engine.residency import Residency
from app.engine.text_encoder import TextEncoder, Tokenizer
from app.errors import StartupError

OnProgress = Callable[[LoadProgress], None]


def build(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    residency: Residency,
    max_sequence_length: int,
    is_distilled: bool,
    on_progress: OnProgress,
) -> Parts:
    """Read every weight and put the networks together."""
    fill = _Filler(checkpoint, dtype, on_progress)
    encoder = _build_encoder(checkpoint.encoder, fill)
    transformer = _build_transformer(checkpoint.transformer, fill)
    vae = _build_vae(checkpoint.vae, fill)
    for network in (encoder, transformer, vae):
        network.eval().requires_grad_(False)
        residency.admit(network, pin=device.type == "cuda")
    return Parts(
        tokenizer=_read_tokenizer(checkpoint.tokenizer, max_sequence_length),
        encoder=encoder,
        transformer=transformer,
        vae=vae,
        make_scheduler=lambda: FlowMatchEulerDiscreteScheduler.from_config(checkpoint.scheduler),
        device=device,
        dtype=dtype,
        is_distilled=is_distilled,
        residency=residency,
        rope=RopeTable(transformer.pos_embed, device),
        layout=checkpoint.layout,
        weights_bytes=fill.done_bytes,
    )


class _Filler:
    """Fills networks from parts and counts the bytes for the progress."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, on_progress: OnProgress) -> None:
        self._dtype = dtype
        self._on_progress = on_progress
        parts = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
        self._total = sum(len(part.slots) for part in parts)
        self._count = 0
        self.done_bytes = 0

    def read(self, part: Part, name: str) -> torch.Tensor:
        """Read one weight of *part* at the arithmetic's precision."""
        value = part.slots[name].read()
        if value.is_floating_point():
            value = value.to(self._dtype)
        self._count += 1
        self.done_bytes += value.nbytes
        if self._count % 16 == 0:
            fraction = min(self._count / self._total, 1.0)
            self._on_progress(LoadProgress("weights", fraction, part.label))
        return value

    def fill(self, network: nn.Module, part: Part, names: Mapping[str, str]) -> None:
        """Give *network* its weights; *names* maps its own names to those of *part*."""
        state = {own: self.read(part, name) for own, name in names.items()}
        network.load_state_dict(state, strict=True, assign=True)


def _build_transformer(part: Part, fill: _Filler) -> Any:
    with torch.device("meta"):
        network = _from_config(Flux2Transformer2DModel, part)
    expected = _shapes(network)
    part.check(expected)
    fill.fill(network, part, {name: name for name in expected})
    return network


def _build_vae(part: Part, fill: _Filler) -> Any:
    with torch.device("meta"):
        network = _from_config(AutoencoderKLFlux2, part)
    expected = _shapes(network)
    part.check(expected)
    fill.fill(network, part, {name: name for name in expected})
    return network


def _build_encoder(part: Part, fill: _Filler) -> TextEncoder:
    """Build the layers that are read; the file may hold more, which is checked to be the known
    rest.
    """
    config = _encoder_config(part)
    with torch.device("meta"):
        layers = nn.ModuleList(
            [Qwen3DecoderLayer(config, number) for number in range(config.num_hidden_layers)]
        )
    expected = {f"model.layers.{name}": shape for name, shape in _shapes(layers).items()}
    expected["model.embed_tokens.weight"] = torch.Size([config.vocab_size, config.hidden_size])
    expected["model.norm.weight"] = torch.Size([config.hidden_size])
    part.check(expected, optional=["lm_head.weight"])
    kept = layers[: TEXT_LAYERS[-1]]
    fill.fill(kept, part, {name: f"model.layers.{name}" for name in _shapes(kept)})
    table = fill.read(part, "model.embed_tokens.weight")
    return TextEncoder(kept, Qwen3RotaryEmbedding(config), table)


def _encoder_config(part: Part) -> Any:
    config = Qwen3Config(**part.config)
    config._attn_implementation = "sdpa"
    return config


def _from_config(kind: Any, part: Part) -> Any:
    """Make *kind* from its config; entries that begin with an underscore are the writer's notes."""
    arguments = {key: value for key, value in part.config.items() if not key.startswith("_")}
    try:
        return kind(**arguments)
    except (TypeError, ValueError):
        raise StartupError(
            f"{part.label}/config.json does not describe a {kind.__name__}; "
            "it belongs to another model."
        ) from None


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _read_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    read_config(folder / "tokenizer_config.json")
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        raise StartupError(
            "tokenizer/ holds no tokenizer that can be read; download the model again."
        ) from None
    return Tokenizer(tokenizer, max_length)
