"""Builds the pipeline's components from a checkpoint.

Networks are created without weights, on PyTorch's meta device, and filled tensor by tensor, so no
weight is in memory twice and a missing one cannot stay randomly initialised.

Modules of diffusers and transformers are imported where they run and nowhere else: it takes ten
seconds, half of them torch's compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config

from app.domain import LoadProgress, WorkerStage
from app.engine.adapters.active import ActiveAdapters
from app.engine.adapters.branches import Place
from app.engine.checkpoint.files import Checkpoint, ComponentFiles, read_config
from app.engine.checkpoint.safetensors_io import CPU
from app.engine.kernels.group_norm import kernels_fault
from app.engine.memory.offload import Offloader
from app.engine.memory.planner import Plan
from app.engine.models.entry import Architecture
from app.engine.modules.attention import Attention, WideHeadProcessor
from app.engine.modules.flux2_shell import Flux2Transformer2DModel
from app.engine.modules.fused_vae import fuse_vae
from app.engine.modules.qwen3_layers import EncoderLayer, Rotary, layer_shapes
from app.engine.modules.rope import rope_tables
from app.engine.modules.vae_shell import AutoencoderKLFlux2
from app.engine.pipeline.components import PipelineComponents
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.pipeline.reference_cache import ReferenceCache
from app.engine.pipeline.schedule import make_schedule
from app.engine.quantization.builder import QuantizedLinearBuilder, encoder_layer, replace_blocks
from app.engine.quantization.cache import QuantizedCache
from app.engine.quantization.formats import WeightFormat
from app.engine.race.encoder import choose_layer
from app.engine.runtime.cuda_graphs import CudaGraphs, new_pool
from app.engine.runtime.exact import ExactTextEncoder, ExactTransformer
from app.engine.runtime.fused import FusedTextEncoder, FusedTransformer
from app.engine.runtime.kernels_choice import KernelsChoice
from app.engine.runtime.networks import TextEncoder, Transformer
from app.engine.runtime.tokenizer import Tokenizer
from app.errors import StartupError

_log = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How the components are built."""

    architecture: Architecture
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    linears: WeightFormat
    """The format of the transformer's layers; an exact one runs the libraries' own modules."""
    encoder_linears: WeightFormat
    attention: Attention
    kernels: KernelsChoice
    plan: Plan
    is_pinned: bool
    prompt_cache: int
    reference_cache: int
    quantized_cache: Path | None
    """The cache folder of quantized layers and races, or None for no cache."""
    max_sequence_length: int
    is_distilled: bool

    @property
    def is_offloaded(self) -> bool:
        """Whether one network at a time is on the GPU."""
        return self.plan is Plan.OFFLOAD


def build(
    checkpoint: Checkpoint, options: BuildOptions, on_progress: OnProgress
) -> PipelineComponents:
    """Read every weight and build the components.

    Raises:
        StartupError: the checkpoint is of another model or damaged.
    """
    parts = (checkpoint.transformer, checkpoint.encoder, checkpoint.vae)
    fill = _Filler(sum(len(part.slots) for part in parts), options, on_progress)
    offloader = Offloader(options.device, pin=options.is_pinned)
    vae = _build_vae(checkpoint.vae, fill, options)
    _admit_vae(vae, offloader, options)
    is_exact = options.linears.is_exact
    encoder, transformer, places = (_build_exact if is_exact else _build_fused)(
        checkpoint, fill, options
    )
    if is_exact:
        offloader.admit(encoder, stays=not options.is_offloaded)
        offloader.admit(transformer, stays=not options.is_offloaded)
    return PipelineComponents(
        architecture=options.architecture,
        tokenizer=_read_tokenizer(checkpoint.tokenizer, options.max_sequence_length),
        encoder=encoder,
        cache=PromptCache(options.prompt_cache, options.device),
        references=ReferenceCache(options.reference_cache, options.device),
        transformer=transformer.eval(),
        adapters=ActiveAdapters(
            places,
            checkpoint.transformer.linear_shapes,
            options.device,
            options.dtype,
            transformer.set_variant,
            is_exact=is_exact,
        ),
        vae=vae,
        decode=_decoder(vae, options),
        schedule=make_schedule(checkpoint.scheduler, options.device),
        device=options.device,
        dtype=options.dtype,
        is_distilled=options.is_distilled,
        is_tiled=options.plan.is_tiled,
        holds_encoder=not (options.is_offloaded or options.plan.is_streamed),
        offloader=offloader,
        rope=rope_tables(
            transformer.network.pos_embed, options.device, options.architecture.reference_time
        ),
        weights_bytes=fill.done_bytes,
    )


def check_parts(checkpoint: Checkpoint) -> None:
    """Check name and shape of every tensor, as `build` does, without reading one.

    Raises:
        StartupError: the checkpoint is of another model or damaged.
    """
    check_vae(checkpoint.vae)
    _check_encoder(checkpoint.encoder)
    _empty(Flux2Transformer2DModel, checkpoint.transformer)
    _read_tokenizer(checkpoint.tokenizer, 1)


def check_vae(part: ComponentFiles) -> None:
    """Check name and shape of every tensor of a VAE; raises as `check_parts` does."""
    _empty(AutoencoderKLFlux2, part)


@dataclass(slots=True)
class _Filler:
    """Reads weights in the options' dtype and reports the load's progress."""

    total: int
    options: BuildOptions
    on_progress: OnProgress
    done: int = 0
    done_bytes: int = 0

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
            value = value.to(dtype or self.options.dtype)
        self.count(part.label, 1, value.nbytes)
        return value

    def norm(self, part: ComponentFiles, name: str) -> nn.Parameter:
        """Read a small weight of *part* onto the device."""
        return nn.Parameter(self.read(part, name, self.options.device), requires_grad=False)

    def fill(
        self,
        network: nn.Module,
        part: ComponentFiles,
        prefix: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the weights of *network*, whose names in *part* begin with *prefix*."""
        state = {name: self.read(part, prefix + name, dtype=dtype) for name in network.state_dict()}
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)

    def count(self, label: str, tensors: int, size_bytes: int) -> None:
        """Count tensors and bytes that were read, and report progress every 16 tensors."""
        before = self.done
        self.done += tensors
        self.done_bytes += size_bytes
        if self.done // 16 != before // 16:
            fraction = min(self.done / self.total, 1.0)
            self.on_progress(LoadProgress(WorkerStage.WEIGHTS, fraction, label))


def _build_exact(
    checkpoint: Checkpoint, fill: _Filler, options: BuildOptions
) -> tuple[TextEncoder, Transformer, list[Place]]:
    """Build the libraries' own modules; of the text encoder's layers those that are read."""
    part = checkpoint.encoder
    # Imports torch's compiler.
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

    config = _check_encoder(part)
    with torch.device("meta"):
        kept = nn.ModuleList(
            [
                Qwen3DecoderLayer(config, number)
                for number in range(options.architecture.text_layers[-1])
            ]
        )
    fill.fill(kept, part, "model.layers.")
    encoder = ExactTextEncoder(
        kept,
        Qwen3RotaryEmbedding(config),
        fill.read(part, "model.embed_tokens.weight"),
        options.architecture.text_layers,
    )
    kind = _librarys("Flux2Transformer2DModel")
    network = _build_network(kind, checkpoint.transformer, fill)
    return encoder, ExactTransformer(network), list(_hooked_places(network))


def _build_fused(
    checkpoint: Checkpoint, fill: _Filler, options: BuildOptions
) -> tuple[TextEncoder, Transformer, list[Place]]:
    """Build our own blocks with quantized weights; only the VAE is offloaded."""
    architecture, pool, part = options.architecture, new_pool(), checkpoint.encoder
    config = _check_encoder(part)
    kind = _encoder_kind(config, options)
    make = _linear_builder(part, options.encoder_linears, "encoder", fill, options)
    layers = nn.ModuleList(
        encoder_layer(number, make, partial(fill.norm, part), kind, eps=config.rms_norm_eps)
        for number in range(architecture.text_layers[-1])
    )
    make.keep()
    encoder = FusedTextEncoder(
        layers,
        _rotary(config).to(options.device),
        fill.read(part, "model.embed_tokens.weight"),
        architecture.text_layers,
        options.kernels,
        pool,
        options.device if options.plan.is_streamed else None,
    )
    # Of those that are streamed only two places stay on the GPU, beside which the rest has room.
    del layers
    network, places = _build_shell(checkpoint.transformer, fill, options)
    transformer = FusedTransformer(network, options.kernels, pool, architecture.graph_tokens)
    return encoder, transformer, places


def _encoder_kind(config: Qwen3Config, options: BuildOptions) -> type[EncoderLayer]:
    """Return the fastest layer for the text encoder of *config*."""
    width, size = config.hidden_size, config.head_dim
    queries = config.num_attention_heads * size
    shapes = {
        "qkv": (queries + 2 * config.num_key_value_heads * size, width),
        "out": (width, queries),
        "up": (2 * config.intermediate_size, width),
        "down": (width, config.intermediate_size),
    }
    return choose_layer(
        options.encoder_linears,
        shapes,
        size,
        options.max_sequence_length,
        options.device,
        options.quantized_cache,
    )


def _build_network(
    kind: type[nn.Module], part: ComponentFiles, fill: _Filler, dtype: torch.dtype | None = None
) -> Any:
    network = _empty(kind, part)
    fill.fill(network, part, dtype=dtype)
    return network


def _build_shell(
    part: ComponentFiles, fill: _Filler, options: BuildOptions
) -> tuple[Any, list[Place]]:
    """Build the transformer with fused blocks; return it with the places of its linear layers."""
    shell = _empty(Flux2Transformer2DModel, part)
    places = list(_hooked_places(shell))
    build_layer = _linear_builder(part, options.linears, "transformer", fill, options)

    def make(*modules: str) -> nn.Module:
        layer = build_layer(*modules)
        places.append(Place(modules, layer, is_hooked=False))
        return layer

    replace_blocks(shell, make, partial(fill.norm, part), options.attention)
    build_layer.keep()
    for name, parameter in list(shell.named_parameters()):
        if parameter.is_meta:
            owner, _, own = name.rpartition(".")
            setattr(shell.get_submodule(owner), own, fill.norm(part, name))
    return shell, places


def _hooked_places(network: nn.Module) -> Iterator[Place]:
    """Yield the places of the linear layers in *network* under the names that they have there."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            yield Place((name,), module, is_hooked=True)


def _linear_builder(
    part: ComponentFiles, wanted: WeightFormat, name: str, fill: _Filler, options: BuildOptions
) -> QuantizedLinearBuilder:
    cache = options.quantized_cache
    return QuantizedLinearBuilder(
        part,
        wanted,
        device=options.device,
        dtype=options.dtype,
        on_read=fill.count,
        cache=None if cache is None else QuantizedCache(cache, part, wanted.name, name),
    )


def _check_encoder(part: ComponentFiles) -> Qwen3Config:
    """Return the config, after a check of every tensor."""
    config = Qwen3Config(**{**part.config, "attn_implementation": "sdpa"})
    shapes = layer_shapes(config)
    expected = {
        f"model.layers.{number}.{name}": shape
        for number in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }
    expected["model.embed_tokens.weight"] = torch.Size([config.vocab_size, config.hidden_size])
    expected["model.norm.weight"] = torch.Size([config.hidden_size])
    part.check(expected, optional=["lm_head.weight"])
    return config


def _rotary(config: Qwen3Config) -> nn.Module:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return Rotary(config.head_dim, rope["rope_theta"])
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    other: nn.Module = Qwen3RotaryEmbedding(config)
    return other


def _build_vae(part: ComponentFiles, fill: _Filler, options: BuildOptions) -> Any:
    """Build the VAE, over our kernels where they run; an exact one is diffusers' as it is."""
    if _fuses_vae(options):
        vae = _build_network(AutoencoderKLFlux2, part, fill, options.vae_dtype)
        fuse_vae(vae)
        return vae
    vae = _build_network(_librarys("AutoencoderKLFlux2"), part, fill, options.vae_dtype)
    if not options.linears.is_exact:
        for attention in vae.decoder.mid_block.attentions:
            attention.set_processor(WideHeadProcessor())
    return vae


def _fuses_vae(options: BuildOptions) -> bool:
    if options.linears.is_exact or not options.kernels.is_on:
        return False
    if fault := kernels_fault(options.device):
        _log.warning("Pictures take longer: the VAE's kernels are not used, since %s.", fault)
    return not fault


def _librarys(name: str) -> type[nn.Module]:
    """Import one of diffusers' networks."""
    import diffusers

    kind: type[nn.Module] = getattr(diffusers, name)
    return kind


def _admit_vae(vae: Any, offloader: Offloader, options: BuildOptions) -> None:
    """Register the VAE: its encoder is offloaded unless all is exact and resident.

    Only edits use the VAE encoder.
    """
    offloader.admit(vae.encoder, stays=options.linears.is_exact and not options.is_offloaded)
    offloader.admit(vae.decoder, stays=not options.is_offloaded)
    for small in (vae.quant_conv, vae.post_quant_conv, vae.bn):
        if small is not None:
            offloader.admit(small, stays=True)


def _decoder(vae: Any, options: BuildOptions) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the decode; ours replays a graph for small images, which are bound by launches."""
    whole = partial(_decode, vae)
    if options.linears.is_exact or not options.kernels.has_graphs:
        return whole
    graphs = CudaGraphs(new_pool(), is_on=True, after=1)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = latents.shape[2] * latents.shape[3] * options.architecture.latent_side**2
        is_small = pixels <= options.architecture.graph_pixels
        return graphs.run(whole, (latents,)) if is_small else whole(latents)

    return decode


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode as `AutoencoderKLFlux2._decode` does, without its tiling."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    pixels: torch.Tensor = vae.decoder(latents)
    return pixels


def _empty(kind: type[nn.Module], part: ComponentFiles) -> nn.Module:
    """Create *kind* without weights, from the config of *part*, after a check of every tensor.

    Keys of the config with a leading underscore are metadata.
    """
    try:
        with torch.device("meta"):
            network = kind(**{key: part.config[key] for key in part.config if key[:1] != "_"})
    except (TypeError, ValueError):
        raise StartupError(
            f"{part.label}/config.json does not describe a {kind.__name__}; "
            "it belongs to another model."
        ) from None
    expected = _shapes(network)
    if isinstance(network, Flux2Transformer2DModel):
        expected |= dict(network.block_shapes())
    part.check(expected)
    return network


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
    # A file can ask for either; `Tokenizer` does both itself.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return Tokenizer(tokenizer, max_length)
