"""Activations as two int8 terms: what they hold, and that the encoder's layer of them is Qwen's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.engine.kernels import prefix_attention, wide_int8
from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer, settled
from app.engine.quantization.linear import WeightOnlyLinear, plain_linear, quantize_int8

pytestmark = pytest.mark.torch

TOLERANCE = 1e-2
HEADS, GROUPS = 4, 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(made: torch.Tensor, right: torch.Tensor) -> float:
    made, right = made.double().cpu(), right.double().cpu()
    return float((made - right).norm() / right.norm())


def restored(terms: wide_int8.Terms) -> torch.Tensor:
    return (256 * terms.high.double() + terms.low.double()) * terms.scale[:, None].double()


def sizes(width: int, size: int, feed: int) -> dict[str, tuple[int, int]]:
    return {
        "qkv": ((HEADS + 2 * GROUPS) * size, width),
        "out": (width, HEADS * size),
        "up": (2 * feed, width),
        "down": (width, feed),
    }


def layers(width: int = 64, size: int = 32, feed: int = 96) -> list[EncoderLayer]:
    """The same layer with plain weights, with int8 weights, and with int8 terms too."""
    weights = {
        name: draw(*shape) / shape[1] ** 0.5 for name, shape in sizes(width, size, feed).items()
    }
    norms = {
        name: nn.Parameter(1 + draw(length).square() / 4, False)
        for name, length in {"in": width, "post": width, "q": size, "k": size}.items()
    }
    plain = {name: plain_linear(weight) for name, weight in weights.items()}
    int8 = {name: WeightOnlyLinear(*quantize_int8(weight)) for name, weight in weights.items()}
    return [
        EncoderLayer(plain, norms, eps=1e-6),
        EncoderLayer(int8, norms, eps=1e-6),
        WideEncoderLayer(int8, norms, eps=1e-6),
    ]


def inputs(tokens: int, own: int, width: int = 64, size: int = 32) -> list[torch.Tensor]:
    angles = torch.outer(torch.arange(tokens), 10_000 ** (-torch.arange(size // 2) / size * 2))
    angles = torch.cat([angles, angles], dim=1)[None]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    mask[..., own:] = False
    return [draw(1, tokens, width, seed=1), mask, angles.cos(), angles.sin()]


def test_two_terms_hold_sixteen_bits():
    """Of a row's largest value, whatever the others are; a row of zeros too."""
    x = draw(64, 512) * 10 ** draw(64, 512, seed=1)
    x[0] = 0
    error = (restored(wide_int8.split(x)) - x).abs().amax(1)

    assert (error <= 1.01 * 2**-16 * x.abs().amax(1)).all()


@pytest.mark.parametrize("outlier", [1, 100, 10_000])
def test_a_row_with_an_outlier_is_rounded_no_worse_than_in_bf16(outlier):
    """At the widest matmul, where one value may be a hundred times the root mean square."""
    x = draw(16, 9728)
    x[:, 7] = outlier

    assert difference(restored(wide_int8.split(x)), x) <= difference(x.bfloat16(), x)


@torch.no_grad()
def test_the_layer_is_qwens_and_no_less_exact_than_int8_weights_alone():
    """Against float32 its error is that of the weights, which both have."""
    exact, weights_only, wide = (settled(layer(*inputs(64, 23))) for layer in layers())

    assert difference(wide, weights_only) < TOLERANCE
    assert difference(wide, exact) < 1.1 * difference(weights_only, exact)


@torch.no_grad()
def test_what_a_layer_leaves_to_the_next_is_added_there():
    """Two layers after one another, with and without the addition between them."""
    layer, given = layers()[2], inputs(64, 23)
    first = layer(*given)

    assert torch.equal(
        settled(layer(first, *given[1:])), settled(layer(settled(first), *given[1:]))
    )


def test_keys_of_padding_are_never_read():
    """Whatever stands there, all outputs are the same: the matmul leaves these keys out."""
    size, own = 32, torch.arange(64) < 23
    _, _, cos, sin = inputs(64, 23, size=size)
    qkv, norms = draw(64, (HEADS + 2 * GROUPS) * size), (torch.ones(size), torch.ones(size))

    def attend() -> torch.Tensor:
        return prefix_attention.attend(qkv, norms, cos[0], sin[0], own, heads=HEADS, eps=1e-6)

    before = attend()
    qkv[23:, HEADS * size :] = 1e4

    assert torch.equal(attend(), before)


def test_only_whole_tiles_are_taken():
    """klein's sizes fit; the demo's, or an odd number of tokens, go another way."""
    klein = sizes(2560, 256, 9728)

    assert WideEncoderLayer.fits(512, klein)
    assert not WideEncoderLayer.fits(500, klein)
    assert not WideEncoderLayer.fits(512, klein | {"up": (2 * 9700, 2560)})


@pytest.fixture
def card():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    return torch.device("cuda", 0)


def on(card: torch.device, *given):
    return [each.to(card) if isinstance(each, torch.Tensor) else each for each in given]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2560, 4096, 9728])
def test_each_way_to_split_is_its_emulation(card, width):
    """Rows alone, after parts and a norm, after SwiGLU."""
    x, feed = draw(512, width).bfloat16(), draw(512, 2 * width).bfloat16()
    weight, parts = (1 + draw(width) / 4).bfloat16(), draw(3, 512, width, seed=2)
    for ways in zip(
        *(
            (
                wide_int8.split(rows),
                wide_int8.split_norm(rows, scale, 1e-6)[1],
                wide_int8.split_norm(rows, scale, 1e-6, added)[1],
                wide_int8.split_swiglu(fed),
            )
            for rows, scale, added, fed in (
                (x, weight, parts, feed),
                on(card, x, weight, parts, feed),
            )
        ),
        strict=True,
    ):
        right, made = map(restored, ways)
        assert difference(made, right) < 1e-3
    settled = wide_int8.split_norm(*on(card, x, weight, 1e-6, parts))[0]
    assert torch.equal(settled, wide_int8.add(*on(card, x, parts)))
    assert difference(settled, wide_int8.add(x, parts)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "width"), [(6144, 2560), (2560, 4096), (2560, 9728)])
def test_the_matmul_is_its_emulation(card, outputs, width):
    """Whole, in parts, and with the outputs that padding lacks."""
    terms = wide_int8.split(draw(512, width).bfloat16())
    weight, scale = quantize_int8(draw(outputs, width, seed=1))
    right = wide_int8.multiply(terms, weight, scale, torch.float32)
    there = wide_int8.Terms(*on(card, *terms)), *on(card, weight, scale)
    own, common = torch.arange(512, device=card) < 70, outputs // 2
    some = wide_int8.multiply(*there, torch.float32, own, common)

    assert difference(wide_int8.multiply(*there, torch.bfloat16), right) < TOLERANCE
    assert difference(wide_int8.multiply_in_parts(*there).sum(0), right) < 1e-5
    assert difference(some[:128], right[:128]) < 1e-5
    assert difference(some[:, :common], right[:, :common]) < 1e-5
    assert not some[128:, common:].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "width"), [(6144, 2560), (2560, 9728)])
def test_hoppers_matmul_makes_the_same_bits(card, monkeypatch, outputs, width):
    """Whole, in parts, with short prompts and the longest; the sums are of integers."""
    if torch.cuda.get_device_capability(card) != (9, 0):
        pytest.skip("this card is no Hopper")
    terms = wide_int8.split(draw(512, width).bfloat16())
    there = wide_int8.Terms(*on(card, *terms)), *on(card, *quantize_int8(draw(outputs, width)))
    owns = [torch.arange(512, device=card) < count for count in (1, 64, 130, 512)]

    def made() -> list[torch.Tensor]:
        whole = [wide_int8.multiply(*there, torch.bfloat16)]
        whole += [wide_int8.multiply_in_parts(*there)]
        for own in owns:
            some = wide_int8.multiply(*there, torch.bfloat16, own, 2560)
            whole += [some[own], some[:, :2560]]
        return whole

    ours = made()
    assert all(wide_int8._RIGHT_ON_HOPPER.values())
    monkeypatch.setattr(wide_int8, "_is_right_on_hopper", lambda *_: False)
    assert all(map(torch.equal, ours, made()))


@pytest.mark.gpu
@pytest.mark.parametrize("own", [1, 41, 64, 200, 512])
@torch.no_grad()
def test_the_layers_kernels_are_their_emulation(card, own):
    """At klein's sizes, with short prompts and the longest."""
    width, size = 1024, 128
    wide = layers(width, size, 2048)[2].bfloat16()
    for layer in (wide.qkv, wide.out, wide.up, wide.down):
        layer.scale.data = layer.scale.data.float()
    given = [
        each if each.dtype == torch.bool else each.bfloat16()
        for each in inputs(512, own, width, size)
    ]
    right = settled(wide(*given))

    assert difference(settled(wide.to(card)(*on(card, *given))), right) < TOLERANCE
