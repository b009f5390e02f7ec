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
        heads = (1, hidden.shape[1], self.query_width // size, size)
        q, k, v = (hidden.new_empty(heads).transpose(1, 2) for _ in range(3))
        norms, rope = (self.norm_q, self.norm_k), (cos[0], sin[0])
        blocks.norm_rotate(self.qkv(normed), norms, rope, self.eps, q, k, v, is_interleaved=False)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden, normed = blocks.rms_norm(
            hidden, self.norm_post, self.eps, joined(self.out, attended)
        )
        down: torch.Tensor = joined(self.down, feed=self.up(normed))
        return hidden + down


class Rotary(nn.Module):
    """`Qwen3RotaryEmbedding` of the default kind: cos and sin, [1, n, s] each."""

    rates: torch.Tensor

    def __init__(self, size: int, theta: float) -> None:
        super().__init__()
        rates = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float) / size))
        self.register_buffer("rates", rates, persistent=False)

    def forward(
        self, like: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both of *positions*, [1, n], in the dtype of *like*."""
        angles = positions[..., None].float() * self.rates
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def layer_shapes(config: Any) -> dict[str, torch.Size]:
    """Return name and shape of every weight of one layer, of transformers' `Qwen3Config`."""
    width, size, mlp = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}
