"""Qwen3's decoder layer with activations of 16 bits in two int8 terms: the GPU's own kernels.

`app.engine.kernels.wide_int8` says what it computes and why it is fast. Nine kernels make a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from app.engine.kernels import prefix_attention, wide_int8
from app.engine.modules.qwen3_layers import EncoderLayer


class Unsettled(NamedTuple):
    """Hidden states whose last addition is left to the next layer's kernel.

    *x* is [n, d], *parts* float32 [count, n, d], of `wide_int8.multiply_in_parts`.
    """

    x: torch.Tensor
    parts: torch.Tensor


def settled(hidden: torch.Tensor | Unsettled) -> torch.Tensor:
    """Return hidden states as a tensor, [1, n, d]."""
    return wide_int8.add(*hidden)[None] if isinstance(hidden, Unsettled) else hidden


class WideEncoderLayer(EncoderLayer):
    """`EncoderLayer` of `WeightOnlyLinear`s with int8 weights."""

    @staticmethod
    def fits(tokens: int, shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Return whether it runs with so many tokens and linear layers of *shapes*, [out, in]."""
        return prefix_attention.fits(tokens) and wide_int8.fits(tokens, shapes.values())

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor | Unsettled,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> Unsettled:
        """Run the layer; the inputs are those of `EncoderLayer`, or what the last one returned."""
        x, parts = hidden if isinstance(hidden, Unsettled) else (hidden[0], None)
        dtype = x.dtype
        # The last query may see every key but padding's.
        own = mask[0, 0, -1]
        x, terms = wide_int8.split_norm(x, self.norm_in, self.eps, parts)
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
        return Unsettled(x, parts)
