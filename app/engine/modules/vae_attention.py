"""The VAE decoder's attention: one head of width 512."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class WideHeadProcessor:
    """Attention of the decoder's middle, one head of the width 512, for diffusers' `Attention`.

    The fused kernels stop at 256 or crawl beyond; two products and a softmax are several times
    faster, for the price of the whole table of scores: 0.5 GB at 1024x1024, less than the decode's
    last layers.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        """[1, c, h, w] -> the same. The last three are what diffusers passes by name."""
        module: Any = attn
        shape = hidden_states.shape
        tokens = module.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        query = module.to_q(tokens) * module.scale
        scores = query @ module.to_k(tokens).transpose(1, 2)
        attended = scores.softmax(dim=-1) @ module.to_v(tokens)
        out = module.to_out[0](attended).transpose(1, 2).reshape(shape)
        result: torch.Tensor = (out + hidden_states) / module.rescale_output_factor
        return result
