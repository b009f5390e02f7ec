"""Builds quantized linear layers and fused blocks from a checkpoint of any precision.

fp8 weights of the checkpoint are used as they are; all others are quantized here on the device, one
layer at a time. Projections of the same input are concatenated first, so they share one matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class QuantizedLinearBuilder:
    """Reads linear layers of *part* and builds them in *format*, on *device*.

    *dtype* is that of layers which are not quantized. *on_read* gets the label of *part*, the
    number of modules and the bytes of each built layer. Layers that *cache* holds are read from
    there.
    """

    part: ComponentFiles
    format: WeightFormat
    device: torch.device
    dtype: torch.dtype
    on_read: Callable[[str, int, int], None]
    cache: QuantizedCache | None = None
    _made: dict[str, nn.Module] = field(default_factory=dict, init=False)

    def __call__(self, *modules: str) -> nn.Module:
        """Build one layer of *modules*, concatenated in this order."""
        origins = {self.part.origin.get(module, module) for module in modules}
        layer = self.part.quantized.get(next(iter(origins))) if len(origins) == 1 else None
        if layer is None:
            name = "+".join(modules)
            made = self._made[name] = self._recall(name) or self._quantize(modules)
        elif (take := self.format.layers().take) is not None:
            made = take(layer, self.device)
        else:
            made = self.format.build(layer.read(self.device), self.dtype)
        size = sum(each.nbytes for each in [*made.parameters(), *made.buffers()])
        self.on_read(self.part.label, len(modules), size)
        return made

    def keep(self) -> None:
        """Write the quantized layers to the cache, unless they were read from it, and close it."""
        if self.cache is not None:
            self.cache.write(
                {
                    f"{name}.{word}": getattr(made, word)
                    for name, made in self._made.items()
                    for word in self.format.layers().cached
                }
            )
            self.cache.close()
        self._made.clear()

    def _recall(self, name: str) -> nn.Module | None:
        names = [f"{name}.{word}" for word in self.format.layers().cached]
        found = self.cache.read(names, self.device) if self.cache else None
        return self.format.layers().make(*found).to(self.device) if found else None

    def _quantize(self, modules: tuple[str, ...]) -> nn.Module:
        slots = [self.part.slots[f"{module}.weight"] for module in modules]
        weight = torch.cat([slot.read(self.device) for slot in slots])
        return self.format.build(weight, self.dtype)


def replace_blocks(
    shell: Any, make: Make, norm: Callable[[str], nn.Parameter], attention: Attention
) -> None:
    """Give *shell*, of `app.engine.modules.flux2_shell`, its fused blocks."""
    width, eps = shell.inner_dim, shell.eps
    shell.transformer_blocks = nn.ModuleList(
        _double(f"transformer_blocks.{number}", make, norm, eps=eps, attention=attention)
        for number in range(shell.doubles)
    )
    shell.single_transformer_blocks = nn.ModuleList(
        SingleBlock(
            make(f"{name}.to_qkv_mlp_proj"),
            make(f"{name}.to_out"),
            (norm(f"{name}.norm_q.weight"), norm(f"{name}.norm_k.weight")),
            width=width,
            eps=eps,
            attention=attention,
        )
        for name in (f"single_transformer_blocks.{number}.attn" for number in range(shell.singles))
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


def encoder_layer(
    number: int,
    make: Make,
    norm: Callable[[str], nn.Parameter],
    kind: type[EncoderLayer] = EncoderLayer,
    *,
    eps: float,
) -> EncoderLayer:
    """Build one of the text encoder's layers, of the given *kind*."""
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
    return kind(linears, norms, eps=eps)
