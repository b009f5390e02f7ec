"""The transformer's blocks and the encoder's layers, written for speed.

diffusers' and transformers' own modules serve every model and every hook; these serve klein:
projections of the same input joined into one product, the attention kernel named, nothing that a
compiler stumbles over. They compute the same formulas in another order, so they are used at 8 bit,
where the last bits are gone anyway; at bf16 the libraries' own modules run and the pixels are
theirs.

Shapes: *n* tokens, *d* the width, *h* heads of 128. All sequences have the batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes query, key and value as [1, h, n, 128] and returns the same shape."""

Rope = tuple[torch.Tensor, torch.Tensor]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with the kernel that torch chooses."""
    return functional.scaled_dot_product_attention(q, k, v)


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with cuDNN's kernel, which knows Hopper's and Blackwell's units."""
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[
        0
    ]
    return result


class SingleBlock(nn.Module):
    """`Flux2SingleTransformerBlock`: attention and feed-forward side by side."""

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
        self.feed_width = _rows(joined) - 3 * width
        self.norm_q, self.norm_k = norms
        self.width, self.eps = width, eps
        self.attention = attention

    def forward(
        self, hidden: torch.Tensor, modulation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[1, n, d] -> [1, n, d]; *modulation* is [1, 3 d]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed = _modulate(hidden, scale, shift, self.eps)
        qkv, feed = torch.split(self.joined(normed), [3 * self.width, self.feed_width], dim=-1)
        q, k, v = _heads(qkv, self.norm_q.shape[0])
        q, k = (
            _norm_rotate(q, self.norm_q, cos, sin, self.eps),
            _norm_rotate(k, self.norm_k, cos, sin, self.eps),
        )
        attended = _attend(self.attention, q, k, v)
        joined: torch.Tensor = self.out(torch.cat([attended, _swiglu(feed)], dim=-1))
        return hidden + gate * joined


class DoubleBlock(nn.Module):
    """`Flux2TransformerBlock`: two streams with their own weights and one attention."""

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
        """Image [1, n, d] and text [1, m, d] in and out; the modulations are [1, 6 d]."""
        shift, scale, gate, shift2, scale2, gate2 = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = text_modulation.chunk(6, dim=-1)
        size, eps, length = self.norm_q.shape[0], self.eps, text.shape[1]
        q, k, v = _heads(self.image_qkv(_modulate(image, scale, shift, eps)), size)
        tq, tk, tv = _heads(self.text_qkv(_modulate(text, t_scale, t_shift, eps)), size)
        q = _norm_rotate(q, self.norm_q, cos[length:], sin[length:], eps)
        k = _norm_rotate(k, self.norm_k, cos[length:], sin[length:], eps)
        tq = _norm_rotate(tq, self.norm_text_q, cos[:length], sin[:length], eps)
        tk = _norm_rotate(tk, self.norm_text_k, cos[:length], sin[:length], eps)
        attended = _attend(
            self.attention,
            torch.cat([tq, q], dim=1),
            torch.cat([tk, k], dim=1),
            torch.cat([tv, v], dim=1),
        )
        image = image + gate * self.image_out(attended[:, length:])
        text = text + t_gate * self.text_out(attended[:, :length])
        up = self.image_up(_modulate(image, scale2, shift2, eps))
        image = image + gate2 * self.image_down(_swiglu(up))
        up = self.text_up(_modulate(text, t_scale2, t_shift2, eps))
        text = text + t_gate2 * self.text_down(_swiglu(up))
        return image, text


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
        joined = _split_last(self.qkv(_rms(hidden, self.norm_in, self.eps)), size)
        heads = self.query_width // size
        groups = (joined.shape[2] - heads) // 2
        q, k, v = torch.split(joined, [heads, groups, groups], dim=2)
        q = _rotate_halves(_rms(q, self.norm_q, self.eps), cos, sin)
        k = _rotate_halves(_rms(k, self.norm_k, self.eps), cos, sin)
        # Each key serves several queries; written out, since not every kernel knows the shorthand.
        k, v = (each.repeat_interleave(heads // groups, dim=2) for each in (k, v))
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(_swiglu(self.up(_rms(hidden, self.norm_post, self.eps))))
        return hidden + down


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


def _rows(linear: Any) -> int:
    return int(linear.weight.shape[0])


def _columns(linear: Any) -> int:
    return int(linear.weight.shape[1])


def _modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _heads(qkv: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, n, 3 d] -> three of [1, n, h, size]."""
    q, k, v = (_split_last(each, size) for each in qkv.chunk(3, dim=-1))
    return q, k, v


def _split_last(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., n * size] -> [..., n, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def _norm_rotate(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Norm each head of [1, n, h, 128] and rotate its pairs of neighbours."""
    normed = _rms(x, weight, eps).float()
    even, odd = _split_last(normed, 2).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (normed * cos[None, :, None] + turned * sin[None, :, None]).to(x.dtype)


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as Qwen does: the first half of each head against the second."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """[1, n, h, 128] each -> [1, n, d]."""
    swapped = (each.transpose(1, 2) for each in (q, k, v))
    return attention(*swapped).transpose(1, 2).flatten(2)
