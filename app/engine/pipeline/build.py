"""Builds the pipeline's parts from a checkpoint.

The networks are made without weights (on torch's meta device) and filled tensor by tensor, so that
no weight is ever held twice and a missing one cannot pass for a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from app.domain import LoadProgress
from app.engine.checkpoint.files import Checkpoint, ComponentFiles, read_config
from app.engine.checkpoint.safetensors_io import CPU
from app.engine.memory.offload import Offloader
from app.engine.models.flux2_klein import TEXT_LAYERS
from app.engine.modules.attention import Attention
from app.engine.modules.rope import RopeTable
from app.engine.modules.vae_attention import WideHeadProcessor
from app.engine.pipeline.components import PipelineComponents, Predict
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.quantization.builder import QuantizedLinearBuilder, encoder_layer, replace_blocks
from app.engine.quantization.cache import QuantizedCache
from app.engine.runtime.compile import Compiler
from app.engine.runtime.cuda_graphs import GraphPool
from app.engine.runtime.exact import TextEncoder, transformer_forward
from app.engine.runtime.fused import FusedTextEncoder, FusedTransformer
from app.engine.runtime.tokenizer import Tokenizer
from app.errors import StartupError

OnProgress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the networks are to be built."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    linears: str
    """`exact` for the libraries' own modules, else a kind of `eight_bit.LinearMaker`."""
    encoder_linears: str
    attention: Attention
    compiler: Compiler
    is_offloaded: bool
    is_pinned: bool
    is_streamed: bool
    is_tiled: bool
    prompt_cache: int
    converted: Path | None
    """Where rounded layers are kept, if anywhere."""
    max_sequence_length: int
    is_distilled: bool


def build(
    checkpoint: Checkpoint, wanted: BuildOptions, on_progress: OnProgress
) -> PipelineComponents:
    """Read every weight and put the networks together."""
    fill = _Filler(checkpoint, wanted, on_progress)
    offloader = Offloader(wanted.device, pin=wanted.is_pinned)
    vae = _build_vae(checkpoint.vae, fill, wanted.vae_dtype)
    _admit_vae(vae, offloader, wanted)
    encoder: TextEncoder | FusedTextEncoder
    if wanted.linears == "exact":
        encoder = _build_encoder(checkpoint.encoder, fill)
        transformer = _build_transformer(checkpoint.transformer, fill)
        offloader.admit(encoder, stays=not wanted.is_offloaded)
        offloader.admit(transformer, stays=not wanted.is_offloaded)
        predict: Predict = partial(transformer_forward, transformer)
    else:
        pool = GraphPool()
        encoder = _build_fast_encoder(checkpoint.encoder, fill, wanted, pool)
        transformer = _build_shell(checkpoint.transformer, fill, wanted)
        predict = FusedTransformer(transformer, wanted.compiler, pool).predict
    transformer.eval()
    return PipelineComponents(
        tokenizer=_read_tokenizer(checkpoint.tokenizer, wanted.max_sequence_length),
        encoder=encoder,
        cache=PromptCache(wanted.prompt_cache, wanted.device),
        transformer=transformer,
        predict=predict,
        vae=vae,
        decode=_decoder(vae, wanted),
        make_scheduler=lambda: FlowMatchEulerDiscreteScheduler.from_config(checkpoint.scheduler),
        device=wanted.device,
        dtype=wanted.dtype,
        is_distilled=wanted.is_distilled,
        is_tiled=wanted.is_tiled,
        offloader=offloader,
        rope=RopeTable(transformer.pos_embed, wanted.device),
        layout=checkpoint.layout,
        weights_bytes=fill.done_bytes,
    )


class _Filler:
    """Reads weights at the arithmetic's precision and counts the bytes for the progress."""

    def __init__(
        self, checkpoint: Checkpoint, wanted: BuildOptions, on_progress: OnProgress
    ) -> None:
        self._wanted = wanted
        self._on_progress = on_progress
        components = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
        self._total = sum(len(part.slots) for part in components)
        self._count = 0
        self.done_bytes = 0

    def read(
        self,
        part: ComponentFiles,
        name: str,
        device: torch.device = CPU,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Read one weight of *part*; *dtype* is for what differs from the rest."""
        value = part.slots[name].read(device)
        if value.is_floating_point():
            value = value.to(dtype or self._wanted.dtype)
        self.count(part.label, 1, value.nbytes)
        return value

    def norm(self, part: ComponentFiles) -> Callable[[str], nn.Parameter]:
        """Return what reads a small weight of *part* onto the card."""

        def read(name: str) -> nn.Parameter:
            value = self.read(part, name, self._wanted.device)
            return nn.Parameter(value, requires_grad=False)

        return read

    def fill(
        self,
        network: nn.Module,
        part: ComponentFiles,
        names: Mapping[str, str],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give *network* its weights; *names* maps its own names to those of *part*."""
        state = {own: self.read(part, name, dtype=dtype) for own, name in names.items()}
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)

    def count(self, label: str, tensors: int, size_bytes: int) -> None:
        """Count what was read."""
        before = self._count
        self._count += tensors
        self.done_bytes += size_bytes
        if self._count // 16 != before // 16:
            fraction = min(self._count / self._total, 1.0)
            self._on_progress(LoadProgress("weights", fraction, label))


def _build_transformer(part: ComponentFiles, fill: _Filler) -> Any:
    with torch.device("meta"):
        network = _from_config(Flux2Transformer2DModel, part)
    expected = _shapes(network)
    part.check(expected)
    fill.fill(network, part, {name: name for name in expected})
    return network


def _build_vae(part: ComponentFiles, fill: _Filler, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        network = _from_config(AutoencoderKLFlux2, part)
    expected = _shapes(network)
    part.check(expected)
    fill.fill(network, part, {name: name for name in expected}, dtype)
    return network


def _build_encoder(part: ComponentFiles, fill: _Filler) -> TextEncoder:
    """Build the layers that are read; the file may hold more, which is checked to be the rest."""
    config = _encoder_config(part)
    layers = _check_encoder(part, config)
    kept = layers[: TEXT_LAYERS[-1]]
    fill.fill(kept, part, {name: f"model.layers.{name}" for name in _shapes(kept)})
    table = fill.read(part, "model.embed_tokens.weight")
    return TextEncoder(kept, Qwen3RotaryEmbedding(config), table)


def _build_fast_encoder(
    part: ComponentFiles, fill: _Filler, wanted: BuildOptions, pool: GraphPool
) -> FusedTextEncoder:
    config = _encoder_config(part)
    _check_encoder(part, config)
    make = QuantizedLinearBuilder(
        part,
        wanted.encoder_linears,
        device=wanted.device,
        dtype=wanted.dtype,
        on_read=fill.count,
        converted=_converted(part, wanted, wanted.encoder_linears, "encoder"),
    )
    layers = nn.ModuleList(
        encoder_layer(number, make, fill.norm(part), eps=config.rms_norm_eps)
        for number in range(TEXT_LAYERS[-1])
    )
    make.keep()
    rotary = Qwen3RotaryEmbedding(config).to(wanted.device)
    table = fill.read(part, "model.embed_tokens.weight")
    return FusedTextEncoder(
        layers, rotary, table, wanted.compiler, pool, wanted.device if wanted.is_streamed else None
    )


def _build_shell(part: ComponentFiles, fill: _Filler, wanted: BuildOptions) -> Any:
    """Build the transformer with our blocks; everything outside the blocks stays as it is."""
    with torch.device("meta"):
        shell = _from_config(Flux2Transformer2DModel, part)
    part.check(_shapes(shell))
    make = QuantizedLinearBuilder(
        part,
        wanted.linears,
        device=wanted.device,
        dtype=wanted.dtype,
        on_read=fill.count,
        converted=_converted(part, wanted, wanted.linears, "transformer"),
    )
    replace_blocks(shell, make, fill.norm(part), wanted.attention)
    make.keep()
    for name, parameter in list(shell.named_parameters()):
        if parameter.is_meta:
            owner = shell.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], fill.norm(part)(name))
    return shell


def _converted(
    part: ComponentFiles, wanted: BuildOptions, kind: str, name: str
) -> QuantizedCache | None:
    return None if wanted.converted is None else QuantizedCache(wanted.converted, part, kind, name)


def _check_encoder(part: ComponentFiles, config: Any) -> nn.ModuleList:
    with torch.device("meta"):
        layers = nn.ModuleList(
            [Qwen3DecoderLayer(config, number) for number in range(config.num_hidden_layers)]
        )
    expected = {f"model.layers.{name}": shape for name, shape in _shapes(layers).items()}
    expected["model.embed_tokens.weight"] = torch.Size([config.vocab_size, config.hidden_size])
    expected["model.norm.weight"] = torch.Size([config.hidden_size])
    part.check(expected, optional=["lm_head.weight"])
    return layers


def _admit_vae(vae: Any, offloader: Offloader, wanted: BuildOptions) -> None:
    """The way in waits on the host unless all is exact and resident: only edits need it."""
    is_exact = wanted.linears == "exact"
    offloader.admit(vae.encoder, stays=is_exact and not wanted.is_offloaded)
    offloader.admit(vae.decoder, stays=not wanted.is_offloaded)
    for small in (vae.quant_conv, vae.post_quant_conv, vae.bn):
        if small is not None:
            offloader.admit(small, stays=True)


def _decoder(vae: Any, wanted: BuildOptions) -> Callable[[torch.Tensor], torch.Tensor]:
    if wanted.linears == "exact":
        return partial(_decode, vae)
    for attention in vae.decoder.mid_block.attentions:
        attention.set_processor(WideHeadProcessor())
    return partial(wanted.compiler.compile(_decode, whole=False, convolves=True), vae)


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLFlux2._decode` without its tiling."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pixels: torch.Tensor = vae.decoder(latents)
    return pixels


def _encoder_config(part: ComponentFiles) -> Any:
    config = Qwen3Config(**part.config)
    config._attn_implementation = "sdpa"
    return config


def _from_config(kind: Any, part: ComponentFiles) -> Any:
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
