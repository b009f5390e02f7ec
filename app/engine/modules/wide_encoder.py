"""Qwen3's decoder layer with activations of 16 bits in two int8 terms: the GPU's own kernels.

`app.engine.kernels.wide_int8` says what it computes and why it is fast. Ten kernels make a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from app.engine.kernels import prefix_attention, wide_int8
from app.engine.modules.qwen3_layers import EncoderLayer


class WideEncoderLayer(EncoderLayer):
    """`EncoderLayer` of `WeightOnlyLinear`s with int8 weights."""

    @staticmethod
    def fits(tokens: int, shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Return whether it runs with so many tokens and linear layers of *shapes*, [out, in]."""
        return prefix_attention.fits(tokens) and wide_int8.fits(tokens, shapes.values())

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer: [1, n, d] -> [1, n, d]; the inputs are those of `EncoderLayer`."""
        dtype = hidden.dtype
        # The last query may see every key but padding's.
        own = mask[0, 0, -1]
        x, terms = wide_int8.split_norm(hidden[0], self.norm_in, self.eps)
        # Keys and values of padding are never read.
        qkv = wide_int8.multiply(
            terms, self.qkv.weight, self.qkv.scale, dtype, own, self.query_width
        )
        attended = prefix_attention.attend(
            qkv,
            (self.norm_q, self.norm_k),
            cos[0],
            sin[0],
            own,
            heads=self.query_width // self.norm_q.shape[0],
            eps=self.eps,
        )
        parts = wide_int8.multiply_in_parts(
            wide_int8.split(attended), self.out.weight, self.out.scale
        )
        x, terms = wide_int8.split_norm(x, self.norm_post, self.eps, parts)
        feed = wide_int8.multiply(terms, self.up.weight, self.up.scale, dtype)
        parts = wide_int8.multiply_in_parts(
            wide_int8.split_swiglu(feed), self.down.weight, self.down.scale
        )
        return wide_int8.add(x, parts)[None]
