"""From a prompt to embeddings: the trimmed encoder, its layers streamed, the cache of prompts."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import nn

from app.engine import torch_private
from app.engine.memory.planner import Plan
from app.engine.modules.qwen3_layers import Rotary
from app.engine.pipeline import build as pipeline_build
from app.engine.pipeline.prompt_cache import PromptCache
from app.engine.pipeline.text import encode_text
from app.engine.runtime.cuda_graphs import new_pool
from app.engine.runtime.fused import FusedTextEncoder
from app.engine.runtime.kernels_choice import KernelsChoice
from app.engine.runtime.tokenizer import Tokens
from tests.support.layout_files import SPEC, build

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "", "long " * 200)


@pytest.fixture(scope="module")
def eight_bit(tiny_klein):
    return build(tiny_klein)


@torch.no_grad()
def embed(components, prompt: str) -> torch.Tensor:
    return components.encoder(components.tokenizer(prompt), components.device)


def test_the_trimmed_encoder_is_the_full_one(tiny_klein):
    """In bf16, 27 layers without norm and logits: the whole model's hidden states, bit by bit."""
    components = build(tiny_klein, linears="bf16", dtype=torch.bfloat16, max_sequence_length=512)
    loaded = Flux2KleinPipeline.from_pretrained(tiny_klein, dtype=torch.bfloat16)
    for prompt in PROMPTS:
        right = loaded._get_qwen3_prompt_embeds(loaded.text_encoder, loaded.tokenizer, prompt)
        assert torch.equal(embed(components, prompt), right)


@pytest.mark.parametrize(("kind", "error"), [("plain", 1e-5), ("int8w", 0.05)])
def test_our_layers_compute_what_qwens_do(tiny_klein, kind, error):
    """Joined projections and written-out attention: the same formulas, then rounded weights."""
    right = build(tiny_klein, linears="bf16")
    made = build(tiny_klein, encoder_linears=kind)
    for prompt in PROMPTS:
        one, other = embed(made, prompt), embed(right, prompt)
        assert float((one - other).norm() / other.norm()) < error


def test_a_prompt_leaves_nothing_to_the_next(tiny_klein, eight_bit):
    """All are sent to the same place: a short one after one that fills it is as the first was."""
    made = [(prompt, embed(eight_bit, prompt)) for prompt in (PROMPTS[2], *PROMPTS)]

    for prompt, embeddings in made:
        assert torch.equal(embed(build(tiny_klein), prompt), embeddings)


class Mixing(nn.Module):
    """A layer in which each token becomes the sum of those that it may see, and of its own."""

    def forward(self, hidden, mask, cos, sin):
        return hidden + mask[0, 0].to(hidden.dtype) @ hidden


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_reads_each_prompt_that_is_sent():
    """Of any length, in any order, sent while the card is still busy; against the processor.

    Small whole numbers, so that every sum is exact.
    """
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    card, length, width = torch.device("cuda", 0), 128, 64
    table = torch.randint(-1, 2, (999, width), generator=torch.manual_seed(0)).float()
    encoder = FusedTextEncoder(
        nn.ModuleList([Mixing()]),
        Rotary(width, 1e6).to(card),
        table,
        (1,),
        KernelsChoice(is_on=True, has_graphs=True, reason="a test"),
        new_pool(),
    )
    made, right = [], []
    for number, count in enumerate((3, 128, 1, 64, 128, 2, 127, 5) * 4):
        ids = torch.randint(999, (count,), generator=torch.manual_seed(number)).tolist()
        if number == 2:  # The graph is there.
            torch_private.spin(200_000_000)
        made.append(encoder(Tokens(ids, length, 7, is_cut=False), card))
        mask = torch.ones(length, length).tril() * (torch.arange(length) < count)
        rows = table[ids + (length - count) * [7]]
        right.append((rows + mask @ rows)[None])

    assert len(encoder._graphs._graphs) == 1
    for each, expected in zip(made, right, strict=True):
        assert torch.equal(each.cpu(), expected)


def test_streamed_layers_give_what_resident_ones_do(tiny_klein, eight_bit):
    """Two places take turns with 27 layers: bit by bit the same, again and again."""
    streamed = build(tiny_klein, plan=Plan.STREAMED)
    for prompt in (*PROMPTS, PROMPTS[0]):
        assert torch.equal(embed(streamed, prompt), embed(eight_bit, prompt))


def test_streamed_layers_hold_two_on_the_card(tiny_klein):
    """All weights wait on the host; the modules that compute are two."""
    layers = build(tiny_klein, plan=Plan.STREAMED).encoder.layers
    modules = {id(layer) for layer in layers}

    assert len(list(layers)) == 27
    assert len(modules) == 2
    assert sum(len(each) for each in layers._host) >= 27 * sum(
        each.nbytes for each in next(iter(layers)).parameters()
    )


def test_streamed_layers_leave_before_the_transformer_comes(tiny_klein, monkeypatch):
    """Their memory on the card is the transformer's: no plan counts both."""
    made, held = weakref.WeakSet(), []
    make_layer, make_shell = pipeline_build.encoder_layer, pipeline_build._build_shell

    def make(*inputs, **options):
        layer = make_layer(*inputs, **options)
        made.add(layer)
        return layer

    def note(*inputs):
        held.append(len(made))
        return make_shell(*inputs)

    monkeypatch.setattr(pipeline_build, "encoder_layer", make)
    monkeypatch.setattr(pipeline_build, "_build_shell", note)
    build(tiny_klein, plan=Plan.STREAMED)
    build(tiny_klein)

    assert held == [2, 27]


def tokens(count: int) -> Tokens:
    return Tokens(count * [0], 4, 0, is_cut=False)


def value(number: int) -> torch.Tensor:
    return torch.full((1, 4, 6), float(number))


def test_a_prompt_that_comes_again_is_not_encoded(eight_bit, monkeypatch):
    """The second time neither tokenizer nor encoder runs, and the embeddings are the same."""
    with torch.no_grad():
        first = encode_text(eight_bit, SPEC)
        monkeypatch.setattr(type(eight_bit.tokenizer), "__call__", None)
        again = encode_text(eight_bit, SPEC)

    assert (first.is_cached, again.is_cached) == (False, True)
    assert torch.equal(first.embeddings, again.embeddings)
    assert first.tokens is again.tokens


def test_the_cache_keeps_the_prompts_used_last():
    """Bounded: the one that was not asked for the longest goes first."""
    cache = PromptCache(2, CPU)
    for number, prompt in enumerate(("a", "b")):
        cache.put(prompt, tokens(number), value(number))
    assert cache.get("a")[0].count == 0
    cache.put("c", tokens(2), value(2))

    assert cache.get("b") is None
    for prompt, number in (("a", 0), ("c", 2)):
        found, embeddings = cache.get(prompt)
        assert found.count == number
        assert torch.equal(embeddings, value(number))


def test_what_is_kept_cannot_be_changed():
    """Both ways are copies."""
    cache, given = PromptCache(1, CPU), value(1)
    cache.put("a", tokens(1), given)
    given.zero_()
    cache.get("a")[1].zero_()

    assert torch.equal(cache.get("a")[1], value(1))


def test_a_cache_of_no_size_keeps_nothing():
    """0 turns it off."""
    cache = PromptCache(0, CPU)
    cache.put("a", tokens(1), value(1))

    assert cache.get("a") is None


def test_a_prompt_put_twice_takes_one_place():
    """What is kept is what the encoder made the first time; nobody else's place is taken."""
    cache = PromptCache(2, CPU)
    cache.put("a", tokens(1), value(1))
    cache.put("a", tokens(2), value(2))
    cache.put("b", tokens(3), value(3))

    assert torch.equal(cache.get("a")[1], value(1))
    assert torch.equal(cache.get("b")[1], value(3))
