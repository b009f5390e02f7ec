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

from app.engine.modules.attention import Attention
from app.engine.modules.ops import added, modulated, rms_norm, split_last


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
        joined = modulated(self.joined, hidden, scale, shift, self.eps)
        # [1, n, 3 * d] and [1, n, 2 * f]
        qkv, feed = torch.tensor_split(joined, [3 * self.width], dim=-1)
        q, k, v = _heads(qkv, self.norm_q.shape[0])  # [1, n, h, 128] each
        q, k = (
            _norm_rotate(q, self.norm_q, cos, sin, self.eps),
            _norm_rotate(k, self.norm_k, cos, sin, self.eps),
        )
        attended = _attend(self.attention, q, k, v)  # [1, n, d]
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
        image: torch.Tensor,
        text: torch.Tensor,
        image_modulation: torch.Tensor,
        text_modulation: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on image [1, n, d] and text [1, m, d]; each modulation is [1, 6 * d]."""
        shift, scale, gate, shift2, scale2, gate2 = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = text_modulation.chunk(6, dim=-1)
        size, eps, length = self.norm_q.shape[0], self.eps, text.shape[1]
        q, k, v = _heads(modulated(self.image_qkv, image, scale, shift, eps), size)
        tq, tk, tv = _heads(modulated(self.text_qkv, text, t_scale, t_shift, eps), size)
        q = _norm_rotate(q, self.norm_q, cos[length:], sin[length:], eps)
        k = _norm_rotate(k, self.norm_k, cos[length:], sin[length:], eps)
        tq = _norm_rotate(tq, self.norm_text_q, cos[:length], sin[:length], eps)
        tk = _norm_rotate(tk, self.norm_text_k, cos[:length], sin[:length], eps)
        attended = _attend(  # [1, m + n, d], text first
            self.attention,
            torch.cat([tq, q], dim=1),
            torch.cat([tk, k], dim=1),
            torch.cat([tv, v], dim=1),
        )
        image = added(self.image_out, image, gate, attended[:, length:])
        text = added(self.text_out, text, t_gate, attended[:, :length])
        up = modulated(self.image_up, image, scale2, shift2, eps)  # [1, n, 2 * f]
        image = added(self.image_down, image, gate2, feed=up)
        up = modulated(self.text_up, text, t_scale2, t_shift2, eps)  # [1, m, 2 * f]
        text = added(self.text_down, text, t_gate2, feed=up)
        return image, text


def _heads(qkv: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split fused QKV: [1, n, 3 * d] -> three of [1, n, h, size]."""
    q, k, v = (split_last(each, size) for each in qkv.chunk(3, dim=-1))
    return q, k, v


def _norm_rotate(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Apply RMSNorm per head of [1, n, h, 128], then RoPE on interleaved pairs, in float32."""
    normed = rms_norm(x, weight, eps).float()
    even, odd = split_last(normed, 2).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)  # [1, n, h, 128]
    return (normed * cos[None, :, None] + turned * sin[None, :, None]).to(x.dtype)


def _attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Compute attention: q, k, v of [1, n, h, 128] each -> [1, n, d]."""
    swapped = (each.transpose(1, 2) for each in (q, k, v))  # [1, h, n, 128] each
    return attention(*swapped).transpose(1, 2).flatten(2)
