"""FLUX.2's transformer without its blocks: embeddings, modulations, last norm and projection.

Names, shapes and formulas are those of diffusers' `Flux2Transformer2DModel`, whose import takes
seconds, most of them torch's compiler, which nothing here uses.

Shapes: n tokens, d the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from app.engine.modules.rope import Rope

_LONGEST_PERIOD = 10_000
"""Of the timestep's embedding."""


class Flux2Transformer2DModel(nn.Module):
    """What surrounds the blocks, whose lists are empty; `block_shapes` tells their weights."""

    def __init__(
        self,
        *,
        patch_size: int = 1,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15_360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: Sequence[int] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
    ) -> None:
        super().__init__()
        width = self.inner_dim = num_attention_heads * attention_head_dim
        self.config = SimpleNamespace(in_channels=in_channels)
        self.eps, self.doubles, self.singles = eps, num_layers, num_single_layers
        self._head, self._mlp = attention_head_dim, int(width * mlp_ratio)
        self.pos_embed = _Positions(axes_dims_rope, rope_theta)
        self.time_guidance_embed = _Time(
            timestep_guidance_channels, width, has_guidance=guidance_embeds
        )
        self.double_stream_modulation_img = _Modulation(width, 6)
        self.double_stream_modulation_txt = _Modulation(width, 6)
        self.single_stream_modulation = _Modulation(width, 3)
        self.x_embedder = nn.Linear(in_channels, width, bias=False)
        self.context_embedder = nn.Linear(joint_attention_dim, width, bias=False)
        self.transformer_blocks, self.single_transformer_blocks = nn.ModuleList(), nn.ModuleList()
        self.norm_out = _LastNorm(width, eps)
        outputs = patch_size**2 * (out_channels or in_channels)
        self.proj_out = nn.Linear(width, outputs, bias=False)

    def block_shapes(self) -> Iterator[tuple[str, torch.Size]]:
        """Yield name and shape of every weight of the blocks, as diffusers stores them."""
        width, mlp, head = self.inner_dim, self._mlp, self._head
        square = (width, width)
        double: dict[str, tuple[int, ...]] = {
            f"attn.{name}.weight": square
            for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")
        }
        double |= {f"attn.add_{name}_proj.weight": square for name in "qkv"}
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            double[f"attn.{name}.weight"] = (head,)
        for name in ("ff", "ff_context"):
            double[f"{name}.linear_in.weight"] = (2 * mlp, width)
            double[f"{name}.linear_out.weight"] = (width, mlp)
        single = {
            "attn.to_qkv_mlp_proj.weight": (3 * width + 2 * mlp, width),
            "attn.to_out.weight": (width, width + mlp),
            "attn.norm_q.weight": (head,),
            "attn.norm_k.weight": (head,),
        }
        for stem, count, shapes in (
            ("transformer_blocks", self.doubles, double),
            ("single_transformer_blocks", self.singles, single),
        ):
            for number in range(count):
                for name, shape in shapes.items():
                    yield f"{stem}.{number}.{name}", torch.Size(shape)


class _Positions(nn.Module):
    """cos and sin of ids [n, axes], computed in float64: [n, head size] each, each value twice."""

    def __init__(self, sizes: Sequence[int], theta: int) -> None:
        super().__init__()
        self._sizes, self._theta = tuple(sizes), theta

    def forward(self, ids: torch.Tensor) -> Rope:
        angles = [
            torch.outer(ids[:, axis].float(), self._rates(size, ids.device))
            for axis, size in enumerate(self._sizes)
        ]
        cos, sin = (
            torch.cat([turn(each).repeat_interleave(2, dim=1).float() for each in angles], dim=-1)
            for turn in (torch.cos, torch.sin)
        )
        return cos, sin

    def _rates(self, size: int, device: torch.device) -> torch.Tensor:
        halves = torch.arange(0, size, 2, dtype=torch.float64, device=device)
        return 1.0 / self._theta ** (halves / size)


class _Time(nn.Module):
    """Embeds timesteps [1] in 0..1000 as [1, d]."""

    def __init__(self, channels: int, width: int, *, has_guidance: bool) -> None:
        super().__init__()
        self._channels = channels
        self.timestep_embedder = _TwoLayers(channels, width)
        if has_guidance:
            # A file may have it; klein's own, which are distilled, do not.
            self.guidance_embedder = _TwoLayers(channels, width)

    def forward(self, timestep: torch.Tensor, _guidance: None) -> torch.Tensor:
        half = self._channels // 2
        places = torch.arange(half, dtype=torch.float32, device=timestep.device)
        rates = torch.exp(-math.log(_LONGEST_PERIOD) * places / half)
        angles = timestep[:, None].float() * rates[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        made: torch.Tensor = self.timestep_embedder(waves.to(timestep.dtype))
        return made


class _TwoLayers(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return made


class _Modulation(nn.Module):
    """Computes *parts* of [1, d] from the timestep's embedding, side by side."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width, bias=False)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear(functional.silu(embedding))
        return made


class _LastNorm(nn.Module):
    """LayerNorm without weights, times 1 + scale, plus shift: [1, n, d] -> the same."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.linear = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(functional.silu(embedding).to(x.dtype)).chunk(2, dim=1)
        normed = functional.layer_norm(x, x.shape[-1:], eps=self._eps)
        made: torch.Tensor = normed * (1 + scale)[:, None] + shift[:, None]
        return made
