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

from app.engine.kernels import blocks
from app.engine.modules.ops import joined


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
        _, normed = blocks.rms_norm(hidden, self.norm_in, self.eps)
        # GQA: KV heads are expanded to h, since not every SDPA backend takes `enable_gqa`.
        heads = hidden.new_empty(3, hidden.shape[1], self.query_width // size, size)
        blocks.norm_rotate(
            self.qkv(normed),
            (self.norm_q, self.norm_k),
            cos[0],
            sin[0],
            self.eps,
            heads,
            is_interleaved=False,
        )
        q, k, v = heads.transpose(1, 2).unsqueeze(1)  # [1, h, n, s] each
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden, normed = blocks.rms_norm(
            hidden, self.norm_post, self.eps, joined(self.out, attended)
        )
        down: torch.Tensor = joined(self.down, feed=self.up(normed))
        return hidden + down
