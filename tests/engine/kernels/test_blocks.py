"""What the blocks compute between their matmuls: the kernels and the arithmetic beside them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from app.engine.kernels import blocks
from app.engine.kernels.blocks import Cast, Change
from app.engine.kernels.triton_check import triton_fault
from app.engine.modules import ops
from app.engine.quantization.linear import Fp8Linear, quantize_fp8

pytestmark = pytest.mark.torch

EPS = 1e-6


class Sizes(NamedTuple):
    tokens: int
    heads: int
    size: int
    feed: int


KLEIN = Sizes(37, 24, 128, 9216)
SMALL = Sizes(5, 2, 32, 192)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def difference(made: torch.Tensor, right: torch.Tensor) -> float:
    assert made.shape == right.shape
    made, right = made.double().cpu(), right.double().cpu()
    return float((made - right).norm() / right.norm())


def turned(tokens: int, size: int, *, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one angle for both of each pair."""
    angles = 9 * draw(tokens, size // 2, seed=5)
    wide = angles.repeat_interleave(2, 1) if is_interleaved else angles.repeat(1, 2)
    return wide.cos(), wide.sin()


def rotated(
    sizes: Sizes,
    groups: int,
    *,
    is_interleaved: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    """`norm_rotate` from a column slice into the last rows of something longer."""
    tokens, heads, size, _ = sizes
    wide = draw(1, tokens, (heads + 2 * groups) * size + 64, dtype=torch.bfloat16)
    wide, q, k = (
        each.to(device, dtype)
        for each in (wide, *(draw(size, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)))
    )
    cos, sin = (each.to(device) for each in turned(tokens, size, is_interleaved=is_interleaved))
    shape = (1, tokens + 3, heads, size)
    outs = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(3)]
    ends = (each[:, :, 3:] for each in outs)
    blocks.norm_rotate(
        wide[..., :-64], (q, k), (cos, sin), EPS, *ends, is_interleaved=is_interleaved
    )
    assert not any(each[:, :, :3].any() for each in outs)
    return tuple(each[0, :, 3:].transpose(0, 1) for each in outs)


@pytest.mark.parametrize("is_interleaved", [True, False])
def test_heads_are_normed_and_pairs_turned_by_their_angles(is_interleaved):
    """As complex numbers; each KV head comes once for each of its query heads, v as it is."""
    sizes, groups = Sizes(5, 4, 32, 0), 2
    made = rotated(sizes, groups, is_interleaved=is_interleaved)

    wide = draw(1, 5, (4 + 2 * groups) * 32 + 64, dtype=torch.bfloat16).float()
    wide = wide[0, :, :-64].view(5, -1, 32)
    weights = [draw(32, seed=seed, dtype=torch.bfloat16).float() for seed in (1, 2)]
    cos, sin = turned(5, 32, is_interleaved=is_interleaved)
    for part, start in ((0, 0), (1, 4)):
        count = 4 if part == 0 else groups
        heads = wide[:, start : start + count]
        normed = torch.nn.functional.rms_norm(heads, (32,), weights[part], EPS)
        lanes = torch.arange(32)
        first = lanes[::2] if is_interleaved else lanes[:16]
        second = lanes[1::2] if is_interleaved else lanes[16:]
        turn = torch.complex(cos[:, first], sin[:, first])[:, None]
        right = torch.complex(normed[..., first], normed[..., second]) * turn
        right = right.repeat_interleave(4 // count, dim=1)
        assert torch.allclose(made[part][..., first], right.real, atol=1e-5)
        assert torch.allclose(made[part][..., second], right.imag, atol=1e-5)
    assert torch.equal(made[2], wide[:, 6:].repeat_interleave(2, dim=1))


def test_a_layer_takes_from_the_kernel_before_what_it_would_cast_itself():
    """With a known scale of its input; without one it casts by the amax."""
    weight, heads = quantize_fp8(draw(48, 256)), draw(1, 8, 5, 32, seed=1)
    x = blocks.merge(heads)
    known = Fp8Linear(*weight, x.abs().amax() / 448)
    cast = known.input_cast

    assert cast is not None
    assert blocks.join(heads, None, cast).dtype == torch.float8_e4m3fn
    assert torch.equal(ops.joined(known, heads), known(x))
    assert Fp8Linear(*weight).input_cast is None
    assert torch.allclose(ops.joined(Fp8Linear(*weight), heads), known(x), rtol=1e-5)


def test_a_layer_may_take_in_what_stands_around_it():
    """Its own methods are called, with the residual settled and the heads side by side."""

    class Taking:
        def modulated(self, x, scale, shift, eps):
            return x, scale, shift, eps

        def added(self, residual, gate, x, feed):
            return residual, gate, x, feed

    x, gate, update = draw(1, 3, 8), draw(1, 8, seed=1), draw(1, 3, 8, seed=2)
    hidden, seen = ops.modulated(Taking(), (x, Change(gate, update)), gate, gate, EPS)
    assert torch.equal(hidden, x + gate * update)
    assert seen == (hidden, gate, gate, EPS)
    heads = draw(1, 2, 3, 4)
    (residual, _, joined, feed), change = ops.added(Taking(), x, gate, heads)
    assert torch.equal(joined, blocks.merge(heads))
    assert residual is x
    assert feed is change is None


def test_what_does_not_fit_into_fp8_becomes_its_limit():
    """And what is no number stays none, so that it is seen."""
    made = Cast(torch.tensor(100.0))(torch.tensor([9.0, -9.0, float("inf"), 1.0, float("nan")]))

    assert made.float()[:4].tolist() == [448, -448, 448, 96]
    assert made.float()[4].isnan()


class OnCard(torch.Tensor):
    """What says that it lies on a GPU."""

    is_cuda = True


def test_a_kernel_that_fails_is_tried_once(monkeypatch, caplog):
    """From then on torch computes the same, and the log says so; what memory lacks passes."""
    calls = []

    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def fail(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        raise ValueError("no such instruction")

    def overflow(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    launches = SimpleNamespace(twice=fail)
    monkeypatch.setattr(blocks, "triton_fault", str)
    monkeypatch.setattr(blocks, "_launches", lambda: launches)
    compute, x = blocks._as_kernel(twice), draw(3)
    made = [compute(x.as_subclass(OnCard)) for _ in range(2)]

    assert all(torch.equal(each, 2 * x) for each in made)
    assert len(calls) == 1
    assert "twice does not run here" in caplog.text
    launches.twice = overflow
    with pytest.raises(torch.OutOfMemoryError):
        blocks._as_kernel(twice)(x.as_subclass(OnCard))


@pytest.fixture
def card(caplog) -> Iterator[str]:
    """The device; no kernel may have been replaced."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    if fault := triton_fault():
        pytest.skip(fault)
    yield "cuda"
    assert "does not run here" not in caplog.text


def added_product(x: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What `add_product` leaves of a copy of *x*, with a rank of several parts."""
    inner, up = draw(*x.shape[:-1], 96, seed=8), draw(96, x.shape[-1], seed=9)
    made = x.clone()
    blocks.add_product(made, *(each.to(device, dtype) for each in (inner, up)))
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [KLEIN, SMALL], ids=["klein", "small"])
@pytest.mark.parametrize("is_cast", [False, True], ids=["bf16", "fp8"])
def test_each_kernel_is_its_emulation(card, sizes, is_cast):
    """In bf16 and cast to fp8, where the card knows it, against the emulation in float32."""
    if is_cast and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card knows no fp8")
    tokens, width = sizes.tokens, sizes.heads * sizes.size
    x, update = (draw(1, tokens, width, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    scale, shift, gate = draw(1, 3 * width, seed=2, dtype=torch.bfloat16).chunk(3, dim=-1)
    wide = draw(1, tokens, width + 2 * sizes.feed, seed=3, dtype=torch.bfloat16)
    heads = draw(1, tokens, sizes.heads, sizes.size, seed=4, dtype=torch.bfloat16).transpose(1, 2)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        a, b, c, d, e, f, g = (
            each.to(device, dtype) for each in (x, update, scale, shift, gate, wide, heads)
        )
        cast = Cast(torch.tensor(30.0, device=device)) if is_cast else None
        made = [
            *blocks.norm_modulate(a, None, c, d, EPS, cast),
            *blocks.norm_modulate(a, Change(e, b), c, d, EPS, cast),
            blocks.join(None, f[..., width:], cast),
            blocks.join(g, f[..., width:], cast),
            blocks.join(g.contiguous(), f[..., width:], cast),
            blocks.join(g, None, cast),
        ]
        if cast is not None:
            room = a.new_zeros(1, tokens, width + sizes.feed, dtype=cast.dtype)
            blocks.fill(g, cast, room)
            assert not room[..., width:].float().any()
            return [*made, blocks.quantize(a, cast), room]
        weight = c[0]
        return [
            *made,
            blocks.gate_add(a, e, b),
            added_product(a, dtype, device),
            *blocks.rms_norm(a, weight, EPS),
            *blocks.rms_norm(a, weight, EPS, b),
        ]

    for made, right in zip(run(card, torch.bfloat16), run("cpu", torch.float32), strict=True):
        assert difference(made, right) < (0.02 if is_cast else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("sizes", [KLEIN, SMALL], ids=["klein", "small"])
def test_the_heads_kernel_is_its_emulation(card, sizes, is_interleaved):
    """With as many KV heads as query heads and with half."""
    for groups in (sizes.heads, sizes.heads // 2):
        made, right = (
            rotated(sizes, groups, is_interleaved=is_interleaved, device=device, dtype=dtype)
            for device, dtype in ((card, torch.bfloat16), ("cpu", torch.float32))
        )
        for pair in zip(made, right, strict=True):
            assert difference(*pair) < 1e-2


@pytest.mark.gpu
def test_the_scale_found_on_a_card_is_the_processors(card):
    """To the last bits, with an end that fills no program."""
    x = draw(1, 37, 3072, dtype=torch.bfloat16)
    made = [torch.ones(2, device=device) for device in (card, "cpu")]
    for each in made:
        blocks.find_scale(x.to(each.device), each[0], each[1])

    assert torch.allclose(made[0].cpu(), made[1], rtol=1e-6)
