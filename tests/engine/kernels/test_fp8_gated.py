"""The fp8 matmul with SwiGLU behind it: what the blocks make of it, and the kernel on a card.

.venv/bin/pytest -m gpu tests/engine/kernels
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from app.engine.kernels import fp8_gated
from app.engine.kernels.fp8_gated import Gated
from app.engine.modules.attention import plain_attention, relative_error
from app.engine.modules.fused_blocks import DoubleBlock, SingleBlock, run_doubles, run_singles
from app.engine.quantization.linear import Fp8Linear, quantize_fp8

pytestmark = pytest.mark.torch

WIDTH, FEED, SIZE, TOKENS, TEXT = 256, 384, 128, 24, 8


def draw(*shape: int, seed: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def layer(inputs: int, outputs: int, *, is_static: bool = True) -> Fp8Linear:
    weight = draw(outputs, inputs, seed=outputs) / inputs**0.5
    return Fp8Linear(*quantize_fp8(weight), torch.tensor(0.02) if is_static else None)


def norm() -> nn.Parameter:
    return nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16), requires_grad=False)


def pictures() -> list[torch.Tensor]:
    """What a double and a single block make of the same inputs."""
    width = WIDTH
    single = SingleBlock(
        layer(width, 3 * width + 2 * FEED),
        layer(width + FEED, width),
        (norm(), norm()),
        width=width,
        eps=1e-6,
        attention=plain_attention,
    )
    parts = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 2 * FEED),
        "down": (FEED, width),
    }
    streams = [
        nn.ModuleDict({name: layer(*sides) for name, sides in parts.items()}) for _ in range(2)
    ]
    double = DoubleBlock(
        *streams, (norm(), norm(), norm(), norm()), eps=1e-6, attention=plain_attention
    )
    image, text = (draw(1, count, width, seed=count).bfloat16() for count in (TOKENS, TEXT))
    six, other, three = (draw(1, 6 * width, seed=seed).bfloat16() for seed in (1, 2, 3))
    rope = [draw(TOKENS + TEXT, SIZE, seed=seed) for seed in (4, 5)]
    image, text = run_doubles([double], image, text, six, other, *rope)
    joint = torch.cat([text, image], dim=1)
    return [joint, run_singles([single], joint, three[:, : 3 * width], *rope)]


@pytest.fixture
def taken(monkeypatch) -> list[Gated]:
    """Has the emulation stand in for the kernel; lists what it was given."""
    seen: list[Gated] = []

    def multiply(given: Gated, out: torch.Tensor) -> None:
        seen.append(given)
        out.copy_(fp8_gated.emulate(given))

    monkeypatch.setattr(fp8_gated, "fault", lambda device: "")
    monkeypatch.setattr(fp8_gated, "_LEAST_ROWS", 1)
    monkeypatch.setattr(fp8_gated, "_RIGHT", {})
    monkeypatch.setattr(fp8_gated, "multiply", multiply)
    return seen


def test_blocks_over_it_are_blocks_without(taken, monkeypatch):
    """Bit for bit, since the stand-in rounds where two passes do."""
    made = pictures()
    # Two up projections and a joined one, of one kind, which is tried before.
    assert len(taken) == 4
    monkeypatch.setattr(fp8_gated, "fault", lambda device: "none here")
    right = pictures()

    assert len(taken) == 4
    assert all(map(torch.equal, made, right))


def test_only_known_scales_of_whole_tiles_are_its_own(taken):
    """A layer whose input, or whose taker's, has no scale yet is multiplied as any other."""
    up, down, x = layer(WIDTH, 2 * FEED), layer(FEED, WIDTH), draw(1, 5, WIDTH, seed=0)
    quantized = up.input_cast(x)

    assert up.gated(quantized, torch.bfloat16, down, 0) is not None
    assert up.gated(quantized, torch.bfloat16, layer(FEED, WIDTH, is_static=False), 0) is None
    odd = layer(WIDTH, 2 * FEED + 2)
    assert odd.gated(quantized, torch.bfloat16, layer(FEED + 1, WIDTH), 0) is None


def test_it_is_hoppers_alone():
    """And for so many rows that all multiprocessors have tiles."""
    assert fp8_gated.fault(torch.device("cpu"))
    up = layer(WIDTH, 2 * FEED)
    assert up.gated(up.input_cast(draw(1, 5, WIDTH, seed=0)), torch.bfloat16, up, 0) is None


@pytest.mark.parametrize("outcome", ["wrong", "nan", "failing"])
def test_a_kernel_that_fails_or_errs_is_not_taken(taken, monkeypatch, caplog, outcome):
    """At its first operands, and never tried again."""
    calls = []

    def multiply(given: Gated, out: torch.Tensor) -> None:
        calls.append(given)
        if outcome == "failing":
            raise ValueError("no such instruction")
        if outcome == "wrong":
            out.copy_((1.1 * fp8_gated.emulate(given).float()).to(out.dtype))

    monkeypatch.setattr(fp8_gated, "multiply", multiply)
    up, down = layer(WIDTH, 2 * FEED), layer(FEED, WIDTH)
    quantized = up.input_cast(draw(1, 5, WIDTH, seed=0))

    assert [up.gated(quantized, torch.bfloat16, down, 0) for _ in range(2)] == [None, None]
    assert len(calls) == 1
    assert ("does not run here" if outcome == "failing" else "is wrong here") in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1024, 1100, 4608])
@pytest.mark.parametrize(("first", "inputs"), [(9216, 12288), (0, 9216)])
def test_the_kernel_is_its_emulation(rows, first, inputs):
    """Into rows that lie further apart, of which the other columns stay as they are."""
    if fault := fp8_gated.fault(torch.device("cuda")):
        pytest.skip(fault)
    width = 9216
    x = draw(rows, 3072, seed=0, device="cuda").to(torch.float8_e4m3fn)
    weight, scale = quantize_fp8(draw(first + 2 * width, 3072, seed=1, device="cuda"))
    scales = torch.tensor(0.02, device="cuda"), scale
    given = Gated(x, weight[first:], *scales, torch.tensor(40.0, device="cuda"))
    out = torch.zeros(rows, inputs, device="cuda").to(x.dtype)
    fp8_gated.multiply(given, out[:, inputs - width :])

    assert relative_error(out[:, inputs - width :], fp8_gated.emulate(given)) < 0.02
    assert not out[:, : inputs - width].float().any()
    assert fp8_gated.is_for(given)
