"""The int8 layer with what stands around it: the emulation against exact products, and the card.

.venv/bin/pytest -m gpu tests/engine/kernels
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from app.engine.kernels import int8_linear
from app.engine.kernels.int8_linear import (
    Addition,
    Modulation,
    Operands,
    Weights,
    emulate,
    hadamard,
)
from app.engine.modules import ops
from app.engine.quantization import int8_kernel
from app.engine.quantization.linear import int8_linear as make_layer
from app.engine.quantization.linear import quantize_rotated

pytestmark = pytest.mark.torch

ROTATION = hadamard(256)
WIDTH, OUTPUTS = 768, 64
KINDS = ("plain", "modulated", "swiglu", "joined", "residual")


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make(kind: str, width: int, outputs: int, rows: int) -> Operands:
    """Operands of *kind*; where a block passes slices, slices."""
    x, feed = draw(1, rows, width, seed=0), draw(1, rows, 2 * width + 64, seed=1)[..., 64:]
    before = max(256, width // 4 // 256 * 256)
    addition = Addition(draw(1, rows, outputs, seed=2), draw(1, 6 * outputs, seed=3)[:, :outputs])
    return {
        "plain": Operands(x),
        "modulated": Operands(
            x, modulation=Modulation(*draw(1, 2 * width, seed=4).chunk(2, 1), 1e-6)
        ),
        "swiglu": Operands(None, feed),
        "joined": Operands(x[..., :before], feed[..., 2 * before :], addition=addition),
        "residual": Operands(x, addition=addition),
    }[kind]


def weights(width: int, outputs: int) -> tuple[torch.Tensor, Weights]:
    """A weight, and what it becomes."""
    exact = draw(outputs, width, seed=5).float() / width**0.5
    return exact, Weights(*quantize_rotated(exact))


def difference(made: torch.Tensor, right: torch.Tensor) -> float:
    made, right = made.float().cpu(), right.float().cpu()
    return float((made - right).norm() / right.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_emulation_is_the_blocks_own_arithmetic(kind):
    """To the error of int8, with LayerNorm, SwiGLU, gate and residual as torch computes them."""
    exact, quantized = weights(WIDTH, OUTPUTS)
    operands = make(kind, WIDTH, OUTPUTS, rows=12)
    x, feed, modulation, addition = (
        each.float() if isinstance(each, torch.Tensor) else each for each in operands
    )
    if modulation is not None:
        x = functional.layer_norm(x, (WIDTH,), eps=1e-6)
        x = x * (1 + modulation.scale.float()) + modulation.shift.float()
    parts = [] if x is None else [x]
    if feed is not None:
        gate, value = feed.chunk(2, dim=-1)
        parts.append(functional.silu(gate) * value)
    right = torch.cat(parts, dim=-1) @ exact.t()
    if addition is not None:
        right = addition.residual + addition.gate * right

    made = emulate(quantized, ROTATION, operands)
    assert (made.shape, made.dtype) == (right.shape, torch.bfloat16)
    assert difference(made, right) < 0.02


def test_a_block_reaches_an_int8_layers_own_methods():
    """What the layer computes with its surroundings is what `ops` returns."""
    exact, quantized = weights(WIDTH, WIDTH)
    layer = make_layer(*quantize_rotated(exact))
    operands = make("modulated", WIDTH, WIDTH, rows=5)
    assert operands.modulation is not None
    hidden, made = ops.modulated(layer, (operands.x, None), *operands.modulation)
    assert hidden is operands.x
    assert torch.equal(made, emulate(quantized, ROTATION, operands))

    operands = make("joined", WIDTH, WIDTH, rows=5)
    assert operands.addition is not None
    assert operands.x is not None
    heads = operands.x.unflatten(-1, (2, -1)).transpose(1, 2)
    made, change = ops.added(layer, *operands.addition, heads, operands.feed)
    assert change is None
    assert torch.equal(made, emulate(quantized, ROTATION, operands))


def test_the_kernels_are_hoppers_alone():
    """On a processor, and for rows or groups that they do not take, something else runs."""
    _, taken = weights(WIDTH, OUTPUTS)
    assert int8_linear.fault(torch.device("cpu"))
    assert int8_linear.fits(taken)
    assert not int8_linear.fits(taken._replace(group=64))
    assert not int8_linear.fits(Weights(torch.empty(8, 2**14, dtype=torch.int8), taken.scales))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outcome", ["right", "wrong", "nan", "failing"])
def test_kernels_that_fail_or_err_are_not_taken(monkeypatch, caplog, kind, outcome):
    """At the first operands of a kind, and never tried again; something else computes them."""
    _, quantized = weights(WIDTH, OUTPUTS)
    operands = make(kind, WIDTH, OUTPUTS, rows=100)
    right = emulate(quantized, ROTATION, operands)
    tried = []

    def multiply(taken, given):
        tried.append(given.given.shape[1])
        if outcome == "failing":
            raise RuntimeError("no C compiler")
        made = emulate(taken, ROTATION, given)
        return {"right": made, "wrong": made * 1.1, "nan": made * float("nan")}[outcome]

    monkeypatch.setattr(int8_linear, "_RIGHT", {})
    monkeypatch.setattr(int8_linear, "_TRIED", 40)
    monkeypatch.setattr(int8_linear, "multiply", multiply)
    monkeypatch.setattr(int8_kernel, "library_product", lambda: None)
    for _ in range(2):
        assert torch.equal(int8_kernel._product(quantized, operands), right)

    assert tried == ([40, 100, 100] if outcome == "right" else [40])
    assert len(caplog.records) == (outcome != "right")


def test_rows_without_a_batch_are_tried_as_rows(monkeypatch):
    """The race draws them so."""
    _, quantized = weights(WIDTH, OUTPUTS)
    monkeypatch.setattr(int8_linear, "_RIGHT", {})
    monkeypatch.setattr(
        int8_linear, "multiply", lambda taken, given: emulate(taken, ROTATION, given)
    )
    assert int8_linear.is_right(quantized, Operands(draw(100, WIDTH, seed=0)))


@pytest.fixture
def card():
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or int8_linear.fault(device):
        pytest.skip("no card that the kernels are for")
    return device


def moved(operands: Operands, device: torch.device) -> Operands:
    """*operands* on *device*, slices of the same strides."""

    def move(each):
        if isinstance(each, torch.Tensor):
            there = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device)
            return there.copy_(each)
        return each if each is None or isinstance(each, float) else type(each)(*map(move, each))

    return Operands(*map(move, operands))


BLOCKS = [
    ("plain", 3072),
    ("modulated", 3072),
    ("residual", 3072),
    ("swiglu", 9216),
    ("joined", 12288),
]
"""The layers of klein's blocks."""


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 37, 600])
@pytest.mark.parametrize(("kind", "width"), BLOCKS)
def test_the_kernels_are_their_emulation(card, kind, width, rows):
    """At klein's widths, with tiles that neither the last row nor the last column fills."""
    _, quantized = weights(width, 400)
    operands = make(kind, width, 400, rows)
    right = emulate(quantized, ROTATION, operands)

    there = Weights(*(each.to(card) for each in quantized[:2]))
    assert difference(int8_linear.multiply(there, moved(operands, card)), right) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "width", "outputs"), [("joined", 12288, 3072), ("modulated", 3072, 27648)]
)
def test_the_kernels_are_their_emulation_at_full_size(card, kind, width, outputs):
    """With more tiles than the card has processors, and the same bytes each time."""
    _, quantized = weights(width, outputs)
    there = Weights(*(each.to(card) for each in quantized[:2]))
    operands = moved(make(kind, width, outputs, 4600), card)

    made = int8_linear.multiply(there, operands)
    assert difference(made, emulate(there, ROTATION.to(card), operands)) < 0.01
    assert all(torch.equal(int8_linear.multiply(there, operands), made) for _ in range(20))
