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
from app.engine.checkpoint.transformer import QuantizedLayer
from app.engine.modules.attention import Attention
from app.engine.modules.fused_blocks import DoubleBlock, SingleBlock
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.quantization.cache import Layer, QuantizedCache
from app.engine.quantization.linear import (
    Fp8Linear,
    WeightOnlyLinear,
    int8_linear,
    quantize_fp8,
    quantize_int8,
    rotated_int8,
)

Make = Callable[..., nn.Module]
"""Builds one linear layer from the names of the modules that it concatenates."""


class QuantizedLinearBuilder:
    """Reads linear layers of *part* and builds them as *kind*, on *device*.

    *kind* is `fp8`, `fp8w`, `int8` or `int8w` (see `app.engine.quantization.linear`), or `plain`
    for no quantization. *on_read* gets the label of *part*, the number of modules and the bytes of
    each built layer. Layers that *quantized_cache* holds are read from there.
    """

    def __init__(
        self,
        part: ComponentFiles,
        kind: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_read: Callable[[str, int, int], None],
        quantized_cache: QuantizedCache | None = None,
    ) -> None:
        self._part = part
        self._kind = kind
        self._device = device
        self._dtype = dtype
        self._on_read = on_read
        self._cache = quantized_cache
        self._made: dict[str, nn.Module] = {}

    def __call__(self, *modules: str) -> nn.Module:
        """Build one layer of *modules*, concatenated in this order."""
        origins = {self._part.origin.get(module, module) for module in modules}
        layer = self._part.quantized.get(next(iter(origins))) if len(origins) == 1 else None
        if layer is not None:
            made = self._take(layer)
        else:
            name = "+".join(modules)
            made = self._made[name] = self._recall(name) or self._round(modules)
        size = sum(each.nbytes for each in [*made.parameters(), *made.buffers()])
        self._on_read(self._part.label, len(modules), size)
        return made

    def keep(self) -> None:
        """Write the quantized layers to the cache, unless they were read from it, and close it."""
        if self._cache is None:
            return
        if not self._cache.is_there and self._kind != "plain" and self._made:
            self._cache.write({name: _layer_of(made) for name, made in self._made.items()})
        self._cache.close()
        self._made.clear()

    def _recall(self, name: str) -> nn.Module | None:
        if self._cache is None:
            return None
        found = self._cache.read(name, self._device)
        if found is None:
            return None
        weight, scale = found
        if self._kind == "fp8":
            return Fp8Linear(weight, scale)
        if self._kind == "int8":
            return int8_linear(weight, scale).to(self._device)
        return WeightOnlyLinear(weight, scale)

    def _take(self, layer: QuantizedLayer) -> nn.Module:
        """Build a layer from the file's fp8 weight, not requantized where the kind allows it."""
        if self._kind == "plain" or self._kind.startswith("int8"):
            return self._make(layer.restored(self._device))
        weight = layer.weight(self._device)
        scale = layer.weight_scale.to(self._device)
        if self._kind == "fp8w" or layer.is_full_precision or scale.numel() > 1:
            return WeightOnlyLinear(weight, scale.reshape(-1) if scale.numel() > 1 else scale)
        given = layer.input_scale
        return Fp8Linear(weight, scale, None if given is None else given.to(self._device))

    def _round(self, modules: tuple[str, ...]) -> nn.Module:
        slots = [self._part.slots[f"{module}.weight"] for module in modules]
        return self._make(torch.cat([slot.read(self._device) for slot in slots]))

    def _make(self, weight: torch.Tensor) -> nn.Module:
        if self._kind == "fp8":
            return Fp8Linear(*quantize_fp8(weight))
        if self._kind == "fp8w":
            return WeightOnlyLinear(*quantize_fp8(weight))
        if self._kind == "int8":
            return rotated_int8(weight).to(self._device)
        if self._kind == "int8w":
            return WeightOnlyLinear(*quantize_int8(weight))
        rows, columns = weight.shape
        plain = nn.Linear(columns, rows, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(self._dtype), requires_grad=False)
        return plain


def _layer_of(made: Any) -> Layer:
    scale = made.weight_scale if isinstance(made, Fp8Linear) else made.scale
    return made.weight, scale


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
