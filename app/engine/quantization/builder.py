"""Builds quantized linear layers and fused blocks from a checkpoint of any precision.

fp8 weights of the checkpoint are used as they are; all others are quantized here on the device, one
layer at a time. Projections of the same input are concatenated first, so they share one matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from app.engine.checkpoint.files import ComponentFiles
from app.engine.modules.attention import Attention
from app.engine.modules.fused_blocks import DoubleBlock, SingleBlock
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.quantization.cache import QuantizedCache
from app.engine.quantization.formats import WeightFormat

Make = Callable[..., nn.Module]
"""Builds one linear layer from the names of the modules that it concatenates."""


class QuantizedLinearBuilder:
    """Reads linear layers of *part* and builds them in *wanted*, on *device*.

    *dtype* is that of layers which are not quantized. *on_read* gets the label of *part*, the
    number of modules and the bytes of each built layer. Layers that *quantized_cache* holds are
    read from there.
    """

    def __init__(
        self,
        part: ComponentFiles,
        wanted: WeightFormat,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_read: Callable[[str, int, int], None],
        quantized_cache: QuantizedCache | None = None,
    ) -> None:
        self._part = part
        self._format = wanted
        self._layers = wanted.layers()
        self._device = device
        self._dtype = dtype
        self._on_read = on_read
        self._cache = quantized_cache
        self._made: dict[str, nn.Module] = {}

    def __call__(self, *modules: str) -> nn.Module:
        """Build one layer of *modules*, concatenated in this order."""
        origins = {self._part.origin.get(module, module) for module in modules}
        layer = self._part.quantized.get(next(iter(origins))) if len(origins) == 1 else None
        if layer is None:
            name = "+".join(modules)
            made = self._made[name] = self._recall(name) or self._quantize(modules)
        elif self._layers.take is not None:
            made = self._layers.take(layer, self._device)
        else:
            made = self._format.build(layer.restored(self._device), self._dtype)
        size = sum(each.nbytes for each in [*made.parameters(), *made.buffers()])
        self._on_read(self._part.label, len(modules), size)
        return made

    def keep(self) -> None:
        """Write the quantized layers to the cache, unless they were read from it, and close it."""
        if self._cache is None:
            return
        self._cache.write(
            {
                f"{name}.{word}": getattr(made, word)
                for name, made in self._made.items()
                for word in self._layers.cached
            }
        )
        self._cache.close()
        self._made.clear()

    def _recall(self, name: str) -> nn.Module | None:
        names = [f"{name}.{word}" for word in self._layers.cached]
        found = self._cache.read(names, self._device) if self._cache else None
        return self._layers.make(*found).to(self._device) if found else None

    def _quantize(self, modules: tuple[str, ...]) -> nn.Module:
        slots = [self._part.slots[f"{module}.weight"] for module in modules]
        weight = torch.cat([slot.read(self._device) for slot in slots])
        return self._format.build(weight, self._dtype)


def replace_blocks(
    shell: Any, make: Make, norm: Callable[[str], nn.Parameter], attention: Attention
) -> None:
    """Replace the blocks of *shell*, a `Flux2Transformer2DModel`, with fused ones."""
    width, eps = shell.inner_dim, shell.transformer_blocks[0].norm1.eps
    shell.transformer_blocks = nn.ModuleList(
        _double(f"transformer_blocks.{number}", make, norm, eps=eps, attention=attention)
        for number in range(len(shell.transformer_blocks))
    )
    shell.single_transformer_blocks = nn.ModuleList(
        _single(
            f"single_transformer_blocks.{number}.attn",
            make,
            norm,
            width=width,
            eps=eps,
            attention=attention,
        )
        for number in range(len(shell.single_transformer_blocks))
    )


def _double(
    name: str,
    make: Make,
    norm: Callable[[str], nn.Parameter],
    *,
    eps: float,
    attention: Attention,
) -> DoubleBlock:
    attn = f"{name}.attn"
    image = nn.ModuleDict(
        {
            "qkv": make(f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
            "out": make(f"{attn}.to_out.0"),
            "up": make(f"{name}.ff.linear_in"),
            "down": make(f"{name}.ff.linear_out"),
        }
    )
    text = nn.ModuleDict(
        {
            "qkv": make(f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"),
            "out": make(f"{attn}.to_add_out"),
            "up": make(f"{name}.ff_context.linear_in"),
            "down": make(f"{name}.ff_context.linear_out"),
        }
    )
    q, k, text_q, text_k = (
        norm(f"{attn}.{each}.weight")
        for each in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    )
    return DoubleBlock(image, text, (q, k, text_q, text_k), eps=eps, attention=attention)


def _single(
    name: str,
    make: Make,
    norm: Callable[[str], nn.Parameter],
    *,
    width: int,
    eps: float,
    attention: Attention,
) -> SingleBlock:
    return SingleBlock(
        make(f"{name}.to_qkv_mlp_proj"),
        make(f"{name}.to_out"),
        (norm(f"{name}.norm_q.weight"), norm(f"{name}.norm_k.weight")),
        width=width,
        eps=eps,
        attention=attention,
    )


def encoder_layer(
    number: int, make: Make, norm: Callable[[str], nn.Parameter], *, eps: float
) -> EncoderLayer:
    """Build one of the text encoder's layers."""
    name = f"model.layers.{number}"
    attn = f"{name}.self_attn"
    linears = {
        "qkv": make(f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
        "out": make(f"{attn}.o_proj"),
        "up": make(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
        "down": make(f"{name}.mlp.down_proj"),
    }
    norms = {
        "in": norm(f"{name}.input_layernorm.weight"),
        "post": norm(f"{name}.post_attention_layernorm.weight"),
        "q": norm(f"{attn}.q_norm.weight"),
        "k": norm(f"{attn}.k_norm.weight"),
    }
    return EncoderLayer(linears, norms, eps=eps)
