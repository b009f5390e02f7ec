"""Forward passes of the text encoder and the transformer, as training needs them.

They walk the libraries' modules without the libraries' host-side checks, which neither a captured
graph nor 27 tiny layers can afford. Each block is an opening (up to attention) and a closing (after
it), both functions of tensors alone: these are what `compiled` compiles, while attention stays the
library's. A test holds both passes to what the pipeline computes.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from tools.shapes.nets import READ_LAYERS, Rotary

_EPS = 1e-6
Triple = tuple[Tensor, Tensor, Tensor]


def text_open(
    x: Tensor, norm: Tensor, projections: Triple, head_norms: tuple[Tensor, Tensor], rotary: Rotary
) -> Triple:
    """From a Qwen3 layer's input to queries, keys and values [n, heads, tokens, width]."""
    x = F.rms_norm(x, (x.shape[-1],), norm, _EPS)
    width = head_norms[0].shape[0]
    q, k, v = (torch.unflatten(F.linear(x, weight), -1, (-1, width)) for weight in projections)
    q = F.rms_norm(q, (width,), head_norms[0], _EPS)
    k = F.rms_norm(k, (width,), head_norms[1], _EPS)
    q, k, v = (_half_turned(q, rotary), _half_turned(k, rotary), v)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def text_close(x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, feed: Triple) -> Tensor:
    """From a Qwen3 layer's attention to its output; `feed` is the gate, up and down weights."""
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), out)
    y = F.rms_norm(x, (x.shape[-1],), norm, _EPS)
    return x + F.linear(F.silu(F.linear(y, feed[0])) * F.linear(y, feed[1]), feed[2])


def stream_open(
    x: Tensor,
    change: Triple,
    projections: Triple,
    head_norms: tuple[Tensor, Tensor],
    rotary: Rotary,
) -> Triple:
    """One stream of a double block, up to attention."""
    x = _modulated(x, change)
    width = head_norms[0].shape[0]
    q, k, v = (torch.unflatten(F.linear(x, weight), -1, (-1, width)) for weight in projections)
    return _normed_turned(q, k, v, head_norms, rotary)


def stream_close(
    x: Tensor, mixed: Tensor, out: Tensor, gate: Tensor, change: Triple, feed: tuple[Tensor, Tensor]
) -> Tensor:
    """One stream of a double block, from attention to its output."""
    x = x + gate * F.linear(mixed.transpose(1, 2).flatten(2), out)
    first, second = F.linear(_modulated(x, change), feed[0]).chunk(2, dim=-1)
    return x + change[2] * F.linear(F.silu(first) * second, feed[1])


def single_open(
    x: Tensor, change: Triple, weight: Tensor, head_norms: tuple[Tensor, Tensor], rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A single block up to attention; the fourth result is its feed-forward half."""
    inner, width = x.shape[-1], head_norms[0].shape[0]
    y = F.linear(_modulated(x, change), weight)
    parts = y[..., : 3 * inner].chunk(3, dim=-1)
    q, k, v = (torch.unflatten(part, -1, (-1, width)) for part in parts)
    first, second = y[..., 3 * inner :].chunk(2, dim=-1)
    return (*_normed_turned(q, k, v, head_norms, rotary), F.silu(first) * second)


def single_close(x: Tensor, mixed: Tensor, fed: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """A single block from attention to its output."""
    return x + gate * F.linear(torch.cat((mixed.transpose(1, 2).flatten(2), fed), dim=-1), out)


def _modulated(x: Tensor, change: Triple) -> Tensor:
    shift, scale, _ = change
    return F.layer_norm(x, (x.shape[-1],), eps=_EPS) * (1 + scale) + shift


def _normed_turned(
    q: Tensor, k: Tensor, v: Tensor, head_norms: tuple[Tensor, Tensor], rotary: Rotary
) -> Triple:
    q = _pair_turned(F.rms_norm(q, q.shape[-1:], head_norms[0], _EPS), rotary)
    k = _pair_turned(F.rms_norm(k, k.shape[-1:], head_norms[1], _EPS), rotary)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _half_turned(x: Tensor, rotary: Rotary) -> Tensor:
    """Qwen's rotation: the first half of a head against the second."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = rotary.cos[0, :, None], rotary.sin[0, :, None]
    return (x.float() * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def _pair_turned(x: Tensor, rotary: Rotary) -> Tensor:
    """Flux's rotation: neighbouring numbers against each other."""
    pairs = torch.unflatten(x.float(), -1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return (x.float() * rotary.cos[:, None] + turned * rotary.sin[:, None]).to(x.dtype)


@dataclass(frozen=True)
class Operations:
    """The six half-blocks, plain or compiled."""

    text_open: Any = text_open
    text_close: Any = text_close
    stream_open: Any = stream_open
    stream_close: Any = stream_close
    single_open: Any = single_open
    single_close: Any = single_close


def compiled() -> Operations:
    """The same operations, fused by the compiler for any batch and length."""
    names = [field.name for field in fields(Operations)]
    plain = Operations()
    return Operations(**{n: torch.compile(getattr(plain, n), dynamic=True) for n in names})


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of any block."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a processor the fused kernel's backward pass takes longer than all the rest of a step.
    scores: Tensor = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


_PLAIN = Operations()


def text_features(
    model: Qwen3ForCausalLM, ids: Tensor, pad: int, rotary: Rotary, *, by: Operations = _PLAIN
) -> Tensor:
    """What klein reads of a prompt: the three hidden states side by side, [n, 64, 3 x width]."""
    core: Any = model.model
    # A product instead of a look-up: its gradient is a product too, and needs no sorting.
    table = core.embed_tokens.weight
    hidden = (ids[..., None] == torch.arange(table.shape[0], device=ids.device)).to(table.dtype)
    hidden = hidden @ table
    positions = torch.arange(ids.shape[1], device=ids.device)
    mask = (positions[:, None] >= positions) & (ids != pad)[:, None, None, :]
    kept = []
    for index, layer in enumerate(core.layers[: READ_LAYERS[-1]], start=1):
        at, mlp = layer.self_attn, layer.mlp
        weights = (at.q_proj.weight, at.k_proj.weight, at.v_proj.weight)
        norms = (at.q_norm.weight, at.k_norm.weight)
        q, k, v = by.text_open(hidden, layer.input_layernorm.weight, weights, norms, rotary)
        feed = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        after = layer.post_attention_layernorm.weight
        hidden = by.text_close(hidden, attend(q, k, v, mask), at.o_proj.weight, after, feed)
        if index in READ_LAYERS:
            kept.append(hidden)
    return torch.cat(kept, dim=-1)


def velocity(
    model: Flux2Transformer2DModel,
    tokens: Tensor,
    *,
    text: Tensor,
    level: Tensor,
    rotary: Rotary,
    mask: Tensor | None = None,
    by: Operations = _PLAIN,
) -> Tensor:
    """The transformer's answer for image tokens [n, t, 64] at noise levels [n] in 0..1.

    `rotary` covers text and image tokens; `mask` ([tokens], true where real) hides padding.
    """
    return velocity_and_thought(model, tokens, text, level, rotary, mask, by)[0]


def velocity_and_thought(
    model: Flux2Transformer2DModel,
    tokens: Tensor,
    text: Tensor,
    level: Tensor,
    rotary: Rotary,
    mask: Tensor | None,
    by: Operations,
) -> tuple[Tensor, Tensor]:
    """The same, and the image tokens' hidden states half way up the single blocks [n, t, width]."""
    core: Any = model
    signal = core.time_guidance_embed.time_proj(level.float() * 1000).to(tokens.dtype)
    moment = core.time_guidance_embed.timestep_embedder(signal)
    image_change = core.double_stream_modulation_img(moment)[:, None].chunk(6, dim=-1)
    text_change = core.double_stream_modulation_txt(moment)[:, None].chunk(6, dim=-1)
    change = core.single_stream_modulation(moment)[:, None].chunk(3, dim=-1)
    image, words = core.x_embedder(tokens), core.context_embedder(text)
    hidden_keys = None if mask is None else mask[None, None, None, :]
    for block in core.transformer_blocks:
        words, image = _double_block(
            block, (words, image), (text_change, image_change), rotary, hidden_keys, by
        )
    joined = torch.cat((words, image), dim=1)
    thought, half = joined, len(core.single_transformer_blocks) // 2
    for number, block in enumerate(core.single_transformer_blocks, start=1):
        at = block.attn
        norms = (at.norm_q.weight, at.norm_k.weight)
        q, k, v, fed = by.single_open(joined, change, at.to_qkv_mlp_proj.weight, norms, rotary)
        mixed = attend(q, k, v, hidden_keys)
        joined = by.single_close(joined, mixed, fed, change[2], at.to_out.weight)
        if number == half:
            thought = joined
    length = words.shape[1]
    answer: Tensor = core.proj_out(core.norm_out(joined[:, length:], moment))
    return answer, thought[:, length:]


def _double_block(
    block: Any,
    streams: tuple[Tensor, Tensor],
    changes: tuple[Any, Any],
    rotary: Rotary,
    mask: Tensor | None,
    by: Operations,
) -> tuple[Tensor, Tensor]:
    at = block.attn
    words, image = streams
    length = words.shape[1]
    text_norms = (at.norm_added_q.weight, at.norm_added_k.weight)
    image_norms = (at.norm_q.weight, at.norm_k.weight)
    text_weights = (at.add_q_proj.weight, at.add_k_proj.weight, at.add_v_proj.weight)
    image_weights = (at.to_q.weight, at.to_k.weight, at.to_v.weight)
    text_rotary = Rotary(rotary.cos[:length], rotary.sin[:length])
    image_rotary = Rotary(rotary.cos[length:], rotary.sin[length:])
    texts = by.stream_open(words, changes[0][:3], text_weights, text_norms, text_rotary)
    images = by.stream_open(image, changes[1][:3], image_weights, image_norms, image_rotary)
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(texts, images, strict=True))
    mixed = attend(q, k, v, mask)
    closings = []
    for x, part, out, change, feed in (
        (words, mixed[:, :, :length], at.to_add_out, changes[0], block.ff_context),
        (image, mixed[:, :, length:], at.to_out[0], changes[1], block.ff),
    ):
        weights = (feed.linear_in.weight, feed.linear_out.weight)
        closings.append(by.stream_close(x, part, out.weight, change[2], change[3:], weights))
    return closings[0], closings[1]
