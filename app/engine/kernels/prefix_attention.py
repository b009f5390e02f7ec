"""Qwen3's attention over a prompt's own tokens, from the joined projection to the merged heads.

Keys of padding are never attended to, and with the causal mask only the keys before a query are; so
of 512 keys a usual prompt needs one block. One kernel norms the heads of q and k (RMSNorm), rotates
them (RoPE) and attends; k is normed again for each query head, which costs less than to write it.

Shapes: n tokens, h query heads and g KV heads of size s.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from app.engine.kernels import blocks

_QUERIES, _KEYS, _WARPS, _STAGES = 64, 64, 4, 2


def attend(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    own: torch.Tensor,
    *,
    heads: int,
    eps: float,
) -> torch.Tensor:
    """Attend: [n, (h + 2 * g) * s] -> [n, h * s].

    *norms* are [s], for q and k; *cos* and *sin* [n, s], with equal halves; *own*, bool [n], says
    which tokens are the prompt's; padding comes after them.
    """
    tokens, size = qkv.shape[0], norms[0].shape[0]
    if not qkv.is_cuda:
        return _attend(qkv.view(tokens, -1, size), norms, cos, sin, own, heads, eps)
    out = qkv.new_empty(tokens, heads * size)
    _kernels().attend[(-(-tokens // _QUERIES), heads)](
        qkv,
        *norms,
        cos,
        sin,
        own,
        out,
        eps,
        size**-0.5 / math.log(2),
        HEADS=heads,
        GROUPS=(qkv.shape[1] // size - heads) // 2,
        SIZE=size,
        TOKENS=tokens,
        QUERIES=_QUERIES,
        KEYS=_KEYS,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out


def fits(tokens: int) -> bool:
    """Return whether the kernel takes so many tokens."""
    return tokens >= max(_QUERIES, _KEYS) and tokens & (tokens - 1) == 0


def _attend(
    joined: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    own: torch.Tensor,
    heads: int,
    eps: float,
) -> torch.Tensor:
    """Attend in torch: [n, h + 2 * g, s] -> [n, h * s]."""
    tokens, groups = len(joined), (joined.shape[1] - heads) // 2
    q, k, v = torch.split(joined, [heads, groups, groups], dim=1)
    q, k = (
        blocks.rotate(blocks.rms_norm(each, weight, eps)[1], cos, sin, is_interleaved=False)
        for each, weight in zip((q, k), norms, strict=True)
    )
    k, v = (each.repeat_interleave(heads // groups, dim=1) for each in (k, v))
    mask = own & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attended.transpose(0, 1).flatten(1)


@cache
def _kernels() -> Any:
    return importlib.import_module("app.engine.kernels.prefix_attention_triton")
