"""The passes of a norm over a picture against torch's own, on the processor and on a card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from app.engine.kernels import group_norm
from app.engine.kernels.group_norm import FeatureMap, add, measure, normalize, phase_weight, unphase

pytestmark = pytest.mark.torch

CPU, CARD = torch.device("cpu"), torch.device("cuda")
HEIGHT, WIDTH = 34, 46


def image(channels: int, *, is_phased: bool, dtype=torch.float32) -> FeatureMap:
    """Noise around 20, so that a sum of squares would cost digits, with a bias to be added."""
    generator = torch.Generator().manual_seed(channels)
    shape = (
        (4 * channels, HEIGHT // 2 + 1, WIDTH // 2 + 1) if is_phased else (channels, HEIGHT, WIDTH)
    )
    data = 20 + 3 * torch.randn(1, *shape, generator=generator)
    data = data.to(dtype, memory_format=torch.channels_last)
    return FeatureMap(data, HEIGHT, WIDTH, torch.randn(channels, generator=generator))


def norm_of(channels: int, groups: int = 32) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    norm.weight.normal_(generator=generator)
    norm.bias.normal_(generator=generator)
    return norm


def whole(given: FeatureMap) -> torch.Tensor:
    data = unphase(given.data, HEIGHT, WIDTH) if given.is_phased else given.data
    return data.float() + given.bias[:, None, None]


def to(given: FeatureMap, device: torch.device) -> FeatureMap:
    return FeatureMap(given.data.to(device), HEIGHT, WIDTH, given.bias.to(device))


def difference(made: torch.Tensor, right: torch.Tensor) -> float:
    made, right = made.float().cpu(), right.float().cpu()
    return float((made - right).norm() / right.norm())


@pytest.mark.parametrize("is_phased", [False, True])
def test_the_norm_is_torchs(is_phased):
    """With SiLU and the bias that was still to be added, wherever the pixels lie."""
    given, norm = image(24, is_phased=is_phased), norm_of(24, 8)

    right = functional.silu(norm(whole(given)))
    assert difference(normalize(measure(given), norm), right) < 1e-4
    assert difference(normalize(measure(given), norm, has_silu=False), norm(whole(given))) < 1e-4


@pytest.mark.parametrize("is_phased", [False, True])
def test_a_sum_is_measured_as_it_is_kept(is_phased):
    """In bfloat16 the moments are those of the rounded sum, which the norm then reads."""
    given = image(16, is_phased=is_phased, dtype=torch.bfloat16)
    data = torch.randn(1, 16, HEIGHT, WIDTH).bfloat16()
    made = add(data, given, given.bias)

    total = (data.float() + whole(given)).bfloat16()
    assert torch.equal(made.data, total)
    assert (
        difference(normalize(made, norm_of(16, 4)), functional.silu(norm_of(16, 4)(total.float())))
        < 0.01
    )


def test_four_small_convolutions_stand_for_upsampling():
    """At the border too, where the padding is of the large picture."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    small = torch.randn(1, 3, 7, 4, generator=generator)

    right = functional.conv2d(functional.interpolate(small, scale_factor=2.0), weight, padding=1)
    made = functional.conv2d(small, phase_weight(weight), padding=1)
    assert torch.allclose(unphase(made, 14, 8), right, atol=1e-5)


def test_kernels_that_fail_or_are_wrong_are_not_taken(monkeypatch, caplog):
    """They are tried, so that no start depends on Triton; the log has the error."""

    def fail(_):
        raise TypeError("another Triton")

    monkeypatch.setattr(group_norm, "_trial_error", fail)
    assert group_norm.kernels_fault.__wrapped__(CARD) == "they do not run here (TypeError)"
    assert "another Triton" in caplog.text

    for second in (0.5, math.nan):
        errors = iter([0.0, second])
        monkeypatch.setattr(group_norm, "_trial_error", lambda _, errors=errors: next(errors))
        reason = f"their relative errors are 0 and {second}"
        assert group_norm.kernels_fault.__wrapped__(CARD) == reason
    monkeypatch.undo()
    assert group_norm._trial_error(CPU) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 256])
@pytest.mark.parametrize("is_phased", [False, True])
def test_the_kernels_are_their_emulation(channels, is_phased):
    """At a width of each decoder, with a last chunk that is not full; twice the same bytes."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    assert not group_norm.kernels_fault(CARD)
    card, norm = CARD, norm_of(channels)
    given = image(channels, is_phased=is_phased, dtype=torch.bfloat16)
    right = normalize(measure(given), norm)
    data = torch.randn(1, channels, HEIGHT, WIDTH).bfloat16()
    data = data.contiguous(memory_format=torch.channels_last)
    right_sum = add(data, given, given.bias)
    right_after = normalize(right_sum, norm)

    norm, there = norm.to(card), to(given, card)
    made = [normalize(measure(there), norm) for _ in range(2)]
    total = add(data.to(card), there, there.bias)

    assert torch.equal(*made)
    assert difference(made[0], right) < 0.01
    assert difference(total.data, right_sum.data) < 0.01
    assert difference(normalize(total, norm), right_after) < 0.01
