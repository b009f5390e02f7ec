"""FLUX.2's transformer blocks with fused projections.

The formulas are those of diffusers' `transformer_flux2.py`. Projections of the same input are
concatenated into one matmul, the attention kernel is chosen explicitly, and what lies between is
joined into few kernels (`app.engine.kernels.blocks`): so a block leaves its last residual to the
norm of the next (`app.engine.modules.ops.State`). The order of operations differs from diffusers',
so these blocks are used with 8-bit weights only, where the last bits are lost anyway; at bf16
diffusers' own modules run and the pixels are equal to diffusers'.

Shapes: n tokens, m text tokens, d the hidden size, h heads of size 128, f the MLP's hidden size.
The batch size is always 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from app.engine.kernels import blocks
from app.engine.modules.attention import Attention
from app.engine.modules.ops import State, added, fed, modulated, settle

Modulation = tuple[torch.Tensor, ...]
Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [n, 128]."""


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

    def forward(self, state: State, modulation: Modulation, rope: Rope) -> State:
        """Run the block on [1, n, d]; *modulation* is shift, scale and gate, [1, d] each."""
        shift, scale, gate = modulation
        # [1, n, 3 * d] and [1, n, 2 * f]
        hidden, qkv, feed = fed(
            self.joined, self.out, state, scale, shift, self.eps, 3 * self.width
        )
        size = self.norm_q.shape[0]
        heads = (1, hidden.shape[1], self.width // size, size)
        q, k = (hidden.new_empty(heads).transpose(1, 2) for _ in range(2))
        norms = self.norm_q, self.norm_k
        blocks.norm_rotate(qkv, norms, rope, self.eps, q, k, is_interleaved=True)
        v = qkv[..., 2 * self.width :].view(heads).transpose(1, 2)
        attended = self.attention(q, k, v)  # [1, h, n, 128]
        return added(self.out, hidden, gate, attended, feed)


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
        image_state: State,
        text_state: State,
        image_modulation: Modulation,
        text_modulation: Modulation,
        image_rope: Rope,
        text_rope: Rope,
    ) -> tuple[State, State]:
        """Run the block on image [1, n, d] and text [1, m, d].

        A modulation is shift, scale and gate of the attention, then of the MLP, [1, d] each.
        """
        shift, scale, gate, shift2, scale2, gate2 = image_modulation
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = text_modulation
        text, text_qkv = modulated(self.text_qkv, text_state, t_scale, t_shift, self.eps)
        image, qkv = modulated(self.image_qkv, image_state, scale, shift, self.eps)
        length, size = text.shape[1], self.norm_q.shape[0]
        heads = (1, length + image.shape[1], image.shape[2] // size, size)
        joint = [image.new_empty(heads).transpose(1, 2) for _ in range(3)]
        for part, given, norms, rope in (
            (slice(length), text_qkv, (self.norm_text_q, self.norm_text_k), text_rope),
            (slice(length, None), qkv, (self.norm_q, self.norm_k), image_rope),
        ):
            q, k, v = (each[:, :, part] for each in joint)
            blocks.norm_rotate(given, norms, rope, self.eps, q, k, v, is_interleaved=True)
        attended = self.attention(*joint)  # [1, h, m + n, 128], text first
        image_state = added(self.image_out, image, gate, attended[:, :, length:])
        text_state = added(self.text_out, text, t_gate, attended[:, :, :length])
        image, _, up = fed(self.image_up, self.image_down, image_state, scale2, shift2, self.eps)
        image_state = added(self.image_down, image, gate2, feed=up)  # *up* is [1, n, 2 * f]
        text, _, up = fed(self.text_up, self.text_down, text_state, t_scale2, t_shift2, self.eps)
        return image_state, added(self.text_down, text, t_gate2, feed=up)


def run_doubles(
    blocks: Iterable[nn.Module],
    image: torch.Tensor,
    text: torch.Tensor,
    image_modulation: torch.Tensor,
    text_modulation: torch.Tensor,
    *rope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run double *blocks* on image [1, n, d] and text [1, m, d].

    The modulations are [1, 6 * d], cos and sin of *rope* [m + n, 128].
    """
    length = text.shape[1]
    inputs = (
        image_modulation.chunk(6, dim=-1),
        text_modulation.chunk(6, dim=-1),
        tuple(each[length:] for each in rope),
        tuple(each[:length] for each in rope),
    )
    states: tuple[State, State] = (image, None), (text, None)
    for block in blocks:
        states = block(*states, *inputs)
    image, text = map(settle, states)
    return image, text


def run_singles(
    blocks: Iterable[nn.Module], hidden: torch.Tensor, modulation: torch.Tensor, *rope: torch.Tensor
) -> torch.Tensor:
    """Run single *blocks* on [1, n, d]; *modulation* is [1, 3 * d], cos and sin [n, 128]."""
    parts = modulation.chunk(3, dim=-1)
    state: State = hidden, None
    for block in blocks:
        state = block(state, parts, rope)
    return settle(state)
