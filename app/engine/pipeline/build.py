"""Builds the pipeline's components from a checkpoint.

Networks are created without weights, on PyTorch's meta device, and filled tensor by tensor, so no
weight is in memory twice and a missing one cannot stay randomly initialised.
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

from app.domain import LoadProgress, WorkerStage
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
from app.engine.quantization.formats import WeightFormat
from app.engine.runtime.compile import Compiler
from app.engine.runtime.cuda_graphs import GraphPool
from app.engine.runtime.exact import TextEncoder, transformer_forward
from app.engine.runtime.fused import FusedTextEncoder, FusedTransformer
from app.engine.runtime.tokenizer import Tokenizer
from app.errors import StartupError

OnProgress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the components are built."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    linears: WeightFormat
    """The format of the transformer's layers; an exact one runs the libraries' own modules."""
    encoder_linears: WeightFormat
    attention: Attention
    compiler: Compiler
    is_offloaded: bool
    is_pinned: bool
    is_streamed: bool
    is_tiled: bool
    prompt_cache: int
    quantized_cache: Path | None
    """The cache folder of quantized layers, or None for no cache."""
    max_sequence_length: int
    is_distilled: bool


def build(
    checkpoint: Checkpoint, options: BuildOptions, on_progress: OnProgress
) -> PipelineComponents:
    """Read every weight and build the components.

    Raises:
        StartupError: the checkpoint is of another model or damaged.
    """
    fill = _Filler(checkpoint, options, on_progress)
    offloader = Offloader(options.device, pin=options.is_pinned)
    vae = _build_vae(checkpoint.vae, fill, options.vae_dtype)
    _admit_vae(vae, offloader, options)
    encoder: TextEncoder | FusedTextEncoder
    if options.linears.is_exact:
        encoder = _build_encoder(checkpoint.encoder, fill)
        transformer = _build_transformer(checkpoint.transformer, fill)
        offloader.admit(encoder, stays=not options.is_offloaded)
        offloader.admit(transformer, stays=not options.is_offloaded)
        predict: Predict = partial(transformer_forward, transformer)
    else:
        pool = GraphPool()
        encoder = _build_fast_encoder(checkpoint.encoder, fill, options, pool)
        transformer = _build_shell(checkpoint.transformer, fill, options)
        predict = FusedTransformer(transformer, options.compiler, pool).predict
    transformer.eval()
    return PipelineComponents(
        tokenizer=_read_tokenizer(checkpoint.tokenizer, options.max_sequence_length),
        encoder=encoder,
        cache=PromptCache(options.prompt_cache, options.device),
        transformer=transformer,
        predict=predict,
        vae=vae,
        decode=_decoder(vae, options),
        make_scheduler=lambda: FlowMatchEulerDiscreteScheduler.from_config(checkpoint.scheduler),
        device=options.device,
        dtype=options.dtype,
        is_distilled=options.is_distilled,
        is_tiled=options.is_tiled,
        offloader=offloader,
        rope=RopeTable(transformer.pos_embed, options.device),
        layout=checkpoint.layout,
        weights_bytes=fill.done_bytes,
    )


class _Filler:
    """Reads weights in the options' dtype and reports the load's progress."""

    def __init__(
        self, checkpoint: Checkpoint, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        self._options = options
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
        """Read one weight of *part*; a *dtype* overrides the options'."""
        value = part.slots[name].read(device)
        if value.is_floating_point():
            value = value.to(dtype or self._options.dtype)
        self.count(part.label, 1, value.nbytes)
        return value

    def norm(self, part: ComponentFiles) -> Callable[[str], nn.Parameter]:
        """Return a function that reads a small weight of *part* onto the device."""

        def read(name: str) -> nn.Parameter:
            value = self.read(part, name, self._options.device)
            return nn.Parameter(value, requires_grad=False)

        return read

    def fill(
        self,
        network: nn.Module,
        part: ComponentFiles,
        names: Mapping[str, str],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the weights of *network*; *names* maps its names to those of *part*."""
        state = {own: self.read(part, name, dtype=dtype) for own, name in names.items()}
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)

    def count(self, label: str, tensors: int, size_bytes: int) -> None:
        """Count tensors and bytes that were read, and report progress every 16 tensors."""
        before = self._count
        self._count += tensors
        self.done_bytes += size_bytes
        if self._count // 16 != before // 16:
            fraction = min(self._count / self._total, 1.0)
            self._on_progress(LoadProgress(WorkerStage.WEIGHTS, fraction, label))


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
    """Build the layers up to the last of `TEXT_LAYERS`; those above are only checked."""
    config = _encoder_config(part)
    layers = _check_encoder(part, config)
    kept = layers[: TEXT_LAYERS[-1]]
    fill.fill(kept, part, {name: f"model.layers.{name}" for name in _shapes(kept)})
    table = fill.read(part, "model.embed_tokens.weight")
    return TextEncoder(kept, Qwen3RotaryEmbedding(config), table)


def _build_fast_encoder(
    part: ComponentFiles, fill: _Filler, options: BuildOptions, pool: GraphPool
) -> FusedTextEncoder:
    config = _encoder_config(part)
    _check_encoder(part, config)
    make = QuantizedLinearBuilder(
        part,
        options.encoder_linears,
        device=options.device,
        dtype=options.dtype,
        on_read=fill.count,
        cache=_quantized_cache(part, options, options.encoder_linears, "encoder"),
    )
    layers = nn.ModuleList(
        encoder_layer(number, make, fill.norm(part), eps=config.rms_norm_eps)
        for number in range(TEXT_LAYERS[-1])
    )
    make.keep()
    rotary = Qwen3RotaryEmbedding(config).to(options.device)
    table = fill.read(part, "model.embed_tokens.weight")
    return FusedTextEncoder(
        layers,
        rotary,
        table,
        options.compiler,
        pool,
        options.device if options.is_streamed else None,
    )


def _build_shell(part: ComponentFiles, fill: _Filler, options: BuildOptions) -> Any:
    """Build the transformer with fused blocks; the modules outside the blocks are diffusers'."""
    with torch.device("meta"):
        shell = _from_config(Flux2Transformer2DModel, part)
    part.check(_shapes(shell))
    make = QuantizedLinearBuilder(
        part,
        options.linears,
        device=options.device,
        dtype=options.dtype,
        on_read=fill.count,
        cache=_quantized_cache(part, options, options.linears, "transformer"),
    )
    replace_blocks(shell, make, fill.norm(part), options.attention)
    make.keep()
    for name, parameter in list(shell.named_parameters()):
        if parameter.is_meta:
            owner = shell.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], fill.norm(part)(name))
    return shell


def _quantized_cache(
    part: ComponentFiles, options: BuildOptions, wanted: WeightFormat, name: str
) -> QuantizedCache | None:
    return (
        None
        if options.quantized_cache is None
        else QuantizedCache(options.quantized_cache, part, wanted.name, name)
    )


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


def _admit_vae(vae: Any, offloader: Offloader, options: BuildOptions) -> None:
    """Register the VAE: its encoder is offloaded unless all is exact and resident.

    Only edits use the VAE encoder.
    """
    is_exact = options.linears.is_exact
    offloader.admit(vae.encoder, stays=is_exact and not options.is_offloaded)
    offloader.admit(vae.decoder, stays=not options.is_offloaded)
    for small in (vae.quant_conv, vae.post_quant_conv, vae.bn):
        if small is not None:
            offloader.admit(small, stays=True)


def _decoder(vae: Any, options: BuildOptions) -> Callable[[torch.Tensor], torch.Tensor]:
    if options.linears.is_exact:
        return partial(_decode, vae)
    for attention in vae.decoder.mid_block.attentions:
        attention.set_processor(WideHeadProcessor())
    return partial(options.compiler.compile(_decode, whole=False, convolves=True), vae)


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode as `AutoencoderKLFlux2._decode` does, without its tiling."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pixels: torch.Tensor = vae.decoder(latents)
    return pixels


def _encoder_config(part: ComponentFiles) -> Any:
    config = Qwen3Config(**part.config)
    config._attn_implementation = "sdpa"
    return config


def _from_config(kind: Any, part: ComponentFiles) -> Any:
    """Create *kind* from its config; keys with a leading underscore are metadata."""
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
