"""The two implementations of transformer and text encoder: the same calls, the same numbers."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from app.domain import RawImage
from app.engine.modules.fused_blocks import DoubleBlock, SingleBlock
from app.engine.pipeline.components import pack
from app.engine.pipeline.denoise import draw_noise
from app.engine.pipeline.references import encode_references
from app.engine.runtime import cuda_graphs
from app.engine.runtime.cuda_graphs import CudaGraphs
from app.engine.runtime.exact import ExactTextEncoder, ExactTransformer
from app.engine.runtime.fused import FusedTextEncoder, FusedTransformer
from app.engine.runtime.networks import TextEncoder, Transformer
from tests.support.layout_files import SPEC, build

pytestmark = pytest.mark.torch

LIMIT = 1e-5
PROMPTS = ("a red circle", "", "long " * 200)
"""With padding, with nothing else, and without any."""
SIZES = ((64, 64), (96, 48), (32, 128))
KINDS = (DoubleBlock, SingleBlock)
REFERENCE = RawImage(80, 64, bytes(number * 7 % 256 for number in range(80 * 64 * 3)))


@pytest.fixture(scope="module")
def pair(tiny_klein):
    """The same weights in both, neither quantized."""
    exact = build(tiny_klein, linears="fp32")
    fused = build(tiny_klein, linears="plain", encoder_linears="plain")
    assert isinstance(exact.transformer, ExactTransformer)
    assert isinstance(fused.transformer, FusedTransformer)
    return exact, fused


def error(made: torch.Tensor, right: torch.Tensor) -> float:
    assert made.shape == right.shape
    return float((made.double() - right.double()).norm() / right.double().norm())


def embed(components, prompt: str) -> torch.Tensor:
    return components.encoder(components.tokenizer(prompt), components.device)


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS, ids=["padded", "empty", "full"])
def test_prompt_embeddings_are_the_same(pair, prompt):
    """Every layer that is read, at every token, padding included."""
    right, made = (embed(components, prompt) for components in pair)

    assert error(made, right) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[2]], ids=["padded", "full"])
def test_velocities_are_the_same(pair, width, height, prompt):
    """With a reference image, early and late in the schedule."""
    spec = replace(SPEC, width=width, height=height, references=(REFERENCE,))
    made = []
    for components in pair:
        references = encode_references(components, spec)
        tokens = torch.cat([pack(draw_noise(components, spec)), references.latents], dim=1)
        context = components.transformer.embed_context(embed(pair[0], prompt))
        rope = components.rope(context.shape[1], (components.grid(spec), *references.grids))
        made.append(
            [
                components.transformer.predict(tokens, torch.tensor([time]), context, *rope)
                for time in (1.0, 0.25)
            ]
        )

    for right, other in zip(*made, strict=True):
        assert error(other, right) <= LIMIT


@pytest.fixture
def captured(pair, monkeypatch):
    """How many blocks of each kind had run by themselves before each capture, since the last."""
    seen, ran = [], []

    class Graph:
        def __init__(self, function, inputs, pool):
            seen.append([ran.count(kind) for kind in KINDS])
            ran.clear()
            self.replay = lambda inputs: None

    for kind in KINDS:
        forward = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda *given, kind=kind, run=forward: ran.append(kind) or run(*given)
        )
    monkeypatch.setattr(cuda_graphs, "_Graph", Graph)
    transformer = pair[1].transformer
    monkeypatch.setattr(transformer, "_graphs", CudaGraphs(lambda: None, is_on=True, after=1))
    monkeypatch.setattr(transformer, "_has_run", False)
    return seen


@torch.no_grad()
def step(fused, width: int) -> None:
    spec = replace(SPEC, width=width)
    tokens = pack(draw_noise(fused, spec))
    context = fused.transformer.embed_context(embed(fused, PROMPTS[0]))
    rope = fused.rope(context.shape[1], (fused.grid(spec),))
    fused.transformer.predict(tokens, torch.tensor([1.0]), context, *rope)


def test_a_size_is_captured_at_its_first_step_after_a_block_of_each_kind(
    pair, captured, monkeypatch
):
    """Libraries choose kernels in these, which no capture allows; first of all, in all blocks."""
    fused = pair[1]
    step(fused, 64)
    step(fused, 64)
    step(fused, 96)
    assert captured == [[2, 2], [1, 1]]

    layer = fused.transformer.network.single_transformer_blocks[1].out
    monkeypatch.setattr(layer, "__class__", type("OfAnotherFormat", (type(layer),), {}))
    step(fused, 32)
    assert captured[2:] == [[1, 2]]


def test_a_size_that_is_long_warms_all_blocks_up(pair, captured, monkeypatch):
    """As the default size does at the start, which is never captured."""
    monkeypatch.setattr(pair[1].transformer, "_graph_tokens", 90)
    step(pair[1], 96)
    assert captured == []
    step(pair[1], 32)
    assert captured == [[3, 3]]


def test_with_adapters_a_size_is_captured_at_its_second_step(pair, captured, monkeypatch):
    """A whole step stands before: a block that has none says nothing of one that has."""
    monkeypatch.setattr(pair[1].transformer, "_variant", ("an adapter",))
    step(pair[1], 64)
    assert captured == []
    step(pair[1], 64)
    assert captured == [[2, 2]]


def public(kind: type) -> dict[str, inspect.Signature | type]:
    """What *kind* offers besides torch's own: each method with its signature."""
    own = {name: getattr(kind, name) for name in dir(kind) if not hasattr(torch.nn.Module, name)}
    own["forward"] = kind.forward
    return {
        name: inspect.signature(each) if callable(each) else type(each)
        for name, each in own.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("protocol", "one", "other"),
    [
        (Transformer, ExactTransformer, FusedTransformer),
        (TextEncoder, ExactTextEncoder, FusedTextEncoder),
    ],
)
def test_both_offer_what_the_pipeline_calls(protocol, one, other):
    """No method is in one alone, and none takes something else."""
    assert public(one) == public(other) == public(protocol)
