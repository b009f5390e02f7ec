"""Attention of the VAE decoder's mid block: one head of size 512."""

from __future__ import annotations

from typing import Any

import torch


class WideHeadProcessor:
    """A processor for diffusers' `Attention` with one head of size 512.

    Fused SDPA kernels support head sizes up to 256 or are slow beyond. Two matmuls and a softmax
    are several times faster, at the cost of materialising the attention scores: 0.5 GB at
    1024x1024, less than the decoder's last layers take.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """Compute attention: [1, c, h, w] -> the same; diffusers passes the other three by name."""
        shape = hidden_states.shape
        tokens = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # [1, h * w, c]
        query = attn.to_q(tokens) * attn.scale
        scores = query @ attn.to_k(tokens).transpose(1, 2)  # [1, h * w, h * w]
        attended = scores.softmax(dim=-1) @ attn.to_v(tokens)
        out = attn.to_out[0](attended).transpose(1, 2).reshape(shape)
        result: torch.Tensor = (out + hidden_states) / attn.rescale_output_factor
        return result
