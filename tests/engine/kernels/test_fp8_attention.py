"""Attention with probabilities and values in e4m3: its arithmetic, and that the kernel has it."""

from __future__ import annotations

import pytest
import torch

from app.engine.kernels import fp8_attention
from app.engine.modules.attention import KERNELS, plain_attention, relative_error
from app.engine.race.measure import attention_error

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


def drawn(heads: int, tokens: int, device: torch.device = CPU) -> list[torch.Tensor]:
    """Queries and keys as normed by heads, values as slices of what one projection makes."""
    generator = torch.Generator(device).manual_seed(tokens)
    shape = (1, tokens, heads, 3 * 128)
    joined = torch.randn(shape, generator=generator, device=device).bfloat16()
    return [each.transpose(1, 2) for each in joined.split(128, dim=-1)]


def test_its_error_keeps_the_races_bound():
    """Heavy-tailed queries, keys and values, against float32."""
    assert 0.03 < attention_error(KERNELS["fp8"], CPU, 1024, 128) < KERNELS["fp8"].max_error


def test_a_token_that_takes_all_is_rounded_once():
    """Its weight is exactly 1, whatever e4m3 makes of its probability."""
    q = torch.full((1, 1, 3, 128), 4.0)
    k = torch.cat([q[:, :, :1] * 1.37, -q.expand(1, 1, 3, 128)], dim=2)
    v = torch.tensor([1.875, 9.0, 9.0, 9.0])[None, None, :, None].expand(1, 1, 4, 128)

    assert torch.equal(fp8_attention.attention(q, k, v), torch.full((1, 1, 3, 128), 1.875))


def test_large_values_are_cut_and_stay_numbers():
    """e4m3 ends at 448."""
    q, k, v = (torch.ones(1, 1, 2, 128), torch.ones(1, 1, 2, 128), torch.full((1, 1, 2, 128), 5e4))

    assert torch.equal(fp8_attention.attention(q, k, v), torch.full((1, 1, 2, 128), 448.0))


def test_its_result_has_rows_of_tokens():
    """As the projection behind it reads them, without a copy."""
    made = fp8_attention.attention(*drawn(2, 40))

    assert made.shape == (1, 2, 40, 128)
    assert made.transpose(1, 2).is_contiguous()


def test_elsewhere_it_is_not_chosen():
    """The kernel is made of Hopper's instructions."""
    assert KERNELS["fp8"].fault(CPU) == "it is written for Hopper"


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize(("heads", "tokens"), [(3, 40), (3, 640), (24, 1536), (3, 4645)])
def test_the_kernel_computes_what_the_processor_does(heads, tokens, mean):
    """To a hundredth: tiles that are full or not, computed whole or in parts; values off zero."""
    card = torch.device("cuda")
    if fault := fp8_attention.fault(card):
        pytest.skip(fault)
    q, k, v = drawn(heads, tokens, card)
    given = q, k, v + mean
    made = fp8_attention.attention(*given)

    assert relative_error(made.cpu(), fp8_attention.attention(*(x.cpu() for x in given))) < 0.01
    assert relative_error(made, plain_attention(*given)) < KERNELS["fp8"].max_error
