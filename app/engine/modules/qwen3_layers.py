"""Qwen3's decoder layer with joined projections, for a prompt of a fixed length.

Shapes: n tokens, d the hidden size, h heads. All sequences have batch size 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from app.engine.modules.ops import rms_norm, split_last, swiglu


class EncoderLayer(nn.Module):
    """`Qwen3DecoderLayer` with joined projections, for a prompt of a fixed length."""

    def __init__(
        self, linears: dict[str, nn.Module], norms: dict[str, nn.Parameter], *, eps: float
    ) -> None:
        super().__init__()
        self.qkv, self.out = linears["qkv"], linears["out"]
        self.up, self.down = linears["up"], linears["down"]
        self.query_width = _columns(self.out)
        self.norm_in, self.norm_post = norms["in"], norms["post"]
        self.norm_q, self.norm_k = norms["q"], norms["k"]
        self.eps = eps

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[1, n, d] -> [1, n, d]; *mask* is [1, 1, n, n], true where a key is seen."""
        size = self.norm_q.shape[0]
        joined = split_last(self.qkv(rms_norm(hidden, self.norm_in, self.eps)), size)
        heads = self.query_width // size
        groups = (joined.shape[2] - heads) // 2
        q, k, v = torch.split(joined, [heads, groups, groups], dim=2)
        q = _rotate_halves(rms_norm(q, self.norm_q, self.eps), cos, sin)
        k = _rotate_halves(rms_norm(k, self.norm_k, self.eps), cos, sin)
        # Each key serves several queries; written out, since not every kernel knows the shorthand.
        k, v = (each.repeat_interleave(heads // groups, dim=2) for each in (k, v))
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(swiglu(self.up(rms_norm(hidden, self.norm_post, self.eps))))
        return hidden + down


def _columns(linear: Any) -> int:
    return int(linear.weight.shape[1])


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as Qwen does: the first half of each head against the second."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
