"""Qwen3's decoder layer with fused projections, for a prompt of fixed length.

The formulas are those of transformers' `modeling_qwen3.py`.

Shapes: n tokens, d the hidden size, h query heads and g KV heads of size s, f the MLP's hidden
size. The batch size is always 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.modules.ops import rms_norm, split_last, swiglu


class EncoderLayer(nn.Module):
    """`Qwen3DecoderLayer` with fused QKV and gate/up projections, without a KV cache."""

    def __init__(
        self, linears: dict[str, Any], norms: dict[str, nn.Parameter], *, eps: float
    ) -> None:
        super().__init__()
        self.qkv, self.out = linears["qkv"], linears["out"]
        self.up, self.down = linears["up"], linears["down"]
        self.query_width = int(self.out.weight.shape[1])
        self.norm_in, self.norm_post = norms["in"], norms["post"]
        self.norm_q, self.norm_k = norms["q"], norms["k"]
        self.eps = eps

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer: [1, n, d] -> [1, n, d].

        *mask* is bool [1, 1, n, n], True where a key is attended to; *cos*, *sin* are [1, n, s].
        """
        size = self.norm_q.shape[0]
        # [1, n, h + 2 * g, s]
        joined = split_last(self.qkv(rms_norm(hidden, self.norm_in, self.eps)), size)
        heads = self.query_width // size
        groups = (joined.shape[2] - heads) // 2
        q, k, v = torch.split(joined, [heads, groups, groups], dim=2)
        q = _rotate_halves(rms_norm(q, self.norm_q, self.eps), cos, sin)
        k = _rotate_halves(rms_norm(k, self.norm_k, self.eps), cos, sin)
        # GQA: KV heads are expanded to h here, since not every SDPA backend takes `enable_gqa`.
        k, v = (each.repeat_interleave(heads // groups, dim=2) for each in (k, v))
        attended = functional.scaled_dot_product_attention(  # [1, h, n, s]
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(swiglu(self.up(rms_norm(hidden, self.norm_post, self.eps))))
        return hidden + down


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE as Qwen does, on the two halves of each head: [1, n, h, s] -> the same."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
