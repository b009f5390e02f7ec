"""The Triton kernel of `app.engine.kernels.prefix_attention`; importing this imports Triton.

One program computes a block of queries of one head, over blocks of keys with a running softmax
(arXiv 2307.08691). The number of tokens is a power of two, and a multiple of both blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normed_and_rotated(
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return both halves of a head's *rows*, [rows, SIZE / 2] each, in the dtype of *x*."""
    HALF: tl.constexpr = SIZE // 2
    dtype: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, HALF)
    place = x + rows[:, None] * STRIDE + lane[None, :]
    first = tl.load(place).to(tl.float32)
    second = tl.load(place + HALF).to(tl.float32)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    inverse = tl.rsqrt(squares / SIZE + eps)[:, None]
    first = (first * inverse).to(dtype).to(tl.float32) * tl.load(weight + lane).to(tl.float32)
    second = (second * inverse).to(dtype).to(tl.float32)
    second *= tl.load(weight + HALF + lane).to(tl.float32)
    angle = rows[:, None] * SIZE + lane[None, :]
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.load(sin + angle).to(tl.float32)
    return (first * c - second * s).to(dtype), (second * c + first * s).to(dtype)


@triton.jit
def attend(
    qkv: tl.tensor,
    norm_q: tl.tensor,
    norm_k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    own: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to the prompt's own keys up to each query; *scale* is of logarithms to the base 2."""
    STRIDE: tl.constexpr = (HEADS + 2 * GROUPS) * SIZE
    block = tl.program_id(0)
    head = tl.program_id(1)
    count = tl.sum(tl.load(own + tl.arange(0, TOKENS)).to(tl.int32))
    queries = block * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, SIZE)
    q_first, q_second = _normed_and_rotated(
        qkv + head * SIZE, norm_q, cos, sin, queries, eps, STRIDE, SIZE
    )
    key = qkv + (HEADS + head // (HEADS // GROUPS)) * SIZE
    value = key + GROUPS * SIZE
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    made = tl.zeros((QUERIES, SIZE), tl.float32)
    for begin in range(0, tl.minimum((block + 1) * QUERIES, count), KEYS):
        keys = begin + tl.arange(0, KEYS)
        k_first, k_second = _normed_and_rotated(key, norm_k, cos, sin, keys, eps, STRIDE, SIZE)
        score = tl.dot(q_first, k_first.T)
        score = tl.dot(q_second, k_second.T, score) * scale
        is_seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] < count)
        score = tl.where(is_seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp2(top - higher)
        share = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(share, 1)
        v = tl.load(value + keys[:, None] * STRIDE + lane[None, :])
        made = tl.dot(share.to(v.dtype), v, made * shrink[:, None])
        top = higher
    made /= total[:, None]
    tl.store(
        out + queries[:, None] * (HEADS * SIZE) + head * SIZE + lane[None, :],
        made.to(out.dtype.element_ty),
    )
