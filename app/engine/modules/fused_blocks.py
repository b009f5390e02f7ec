"""FLUX.2's transformer blocks with fused projections.

The formulas are those of diffusers' `transformer_flux2.py`. Projections of the same input are
concatenated into one matmul, the attention kernel is chosen explicitly, and nothing causes a graph
break in `torch.compile`. The order of operations differs from diffusers', so these blocks are used
with 8-bit weights only, where the last bits are lost anyway; at bf16 diffusers' own modules run and
the pixels are equal to diffusers'.

Shapes: n tokens, m text tokens, d the hidden size, h heads of size 128, f the MLP's hidden size.
The batch size is always 1.
"""

from __future__ import annotations

import torch
from torch import nn

from app.engine.kernels import blocks
from app.engine.kernels.blocks import Change
from app.engine.modules.attention import Attention
from app.engine.modules.ops import (
    State,
    after_swiglu,
    gated,
    input_cast,
    modulated,
    settle,
    split_last,
)


class SingleBlock(nn.Module):
    """`Flux2SingleTransformerBlock`: attention and MLP in parallel, from one projection."""

    def __init__(
        self,
        joined: nn.Module,
        out: nn.Module,
        norms: tuple[nn.Parameter, nn.Parameter],
        *,
        width: int,
        eps: float,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.joined, self.out = joined, out
        self.norm_q, self.norm_k = norms
        self.width, self.eps = width, eps
        self.attention = attention

    def forward(
        self, hidden: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Run the block: [1, n, d] -> [1, n, d]; *modulation* is [1, 3 * d], *cos* [n, 128]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)  # [1, d] each
        hidden, joined = modulated(self.joined, (hidden, None), scale, shift, self.eps)
        # [1, n, 3 * d] and [1, n, 2 * f]
        qkv, feed = torch.tensor_split(joined, [3 * self.width], dim=-1)
        size = self.norm_q.shape[0]
        heads = hidden.new_empty(2, hidden.shape[1], self.width // size, size)
        blocks.norm_rotate(
            qkv, (self.norm_q, self.norm_k), cos, sin, self.eps, heads, is_interleaved=True
        )
        q, k = heads.transpose(1, 2).unsqueeze(1)
        v = split_last(qkv[..., 2 * self.width :], size).transpose(1, 2)
        attended = self.attention(q, k, v)  # [1, h, n, 128]
        both = blocks.join(attended, feed, input_cast(self.out))
        return settle(gated(self.out, both, hidden, gate))


class DoubleBlock(nn.Module):
    """`Flux2TransformerBlock`: image and text streams with own weights and joint attention."""

    def __init__(
        self,
        image: nn.ModuleDict,
        text: nn.ModuleDict,
        norms: tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter],
        *,
        eps: float,
        attention: Attention,
    ) -> None:
        super().__init__()
        self.image_qkv, self.image_out = image["qkv"], image["out"]
        self.image_up, self.image_down = image["up"], image["down"]
        self.text_qkv, self.text_out = text["qkv"], text["out"]
        self.text_up, self.text_down = text["up"], text["down"]
        self.norm_q, self.norm_k, self.norm_text_q, self.norm_text_k = norms
        self.eps = eps
        self.attention = attention

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on image [1, n, d] and text [1, m, d]; each modulation is [1, 6 * d]."""
        shift, scale, gate, *rest = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, *t_rest = text_modulation.chunk(6, dim=-1)
        length, size = text.shape[1], self.norm_q.shape[0]
        text, text_qkv = modulated(self.text_qkv, (text, None), t_scale, t_shift, self.eps)
        image, qkv = modulated(self.image_qkv, (image, None), scale, shift, self.eps)
        tokens, width = length + image.shape[1], image.shape[2]
        heads = image.new_empty(3, tokens, width // size, size)
        for each, norms, part in (
            (text_qkv, (self.norm_text_q, self.norm_text_k), slice(length)),
            (qkv, (self.norm_q, self.norm_k), slice(length, None)),
        ):
            blocks.norm_rotate(
                each, norms, cos[part], sin[part], self.eps, heads[:, part], is_interleaved=True
            )
        attended = self.attention(*heads.transpose(1, 2).unsqueeze(1))  # [1, h, m + n, 128]
        merged = blocks.merge(attended[:, :, length:], input_cast(self.image_out))
        image_state = gated(self.image_out, merged, image, gate)
        merged = blocks.merge(attended[:, :, :length], input_cast(self.text_out))
        text_state = gated(self.text_out, merged, text, t_gate)
        image = _feed(self.image_up, self.image_down, image_state, *rest, self.eps)
        return image, _feed(self.text_up, self.text_down, text_state, *t_rest, self.eps)


def _feed(
    up: nn.Module,
    down: nn.Module,
    state: State,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Run the MLP of a double block, with its norm and residual: [1, n, d]."""
    hidden, middle = modulated(up, state, scale, shift, eps)  # [1, n, d], [1, n, 2 * f]
    return settle((hidden, Change(gate, after_swiglu(down, middle))))
