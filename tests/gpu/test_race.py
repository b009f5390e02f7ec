"""The race on the card that is here: what it costs, what it finds, and that it is held once."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from app.engine.models.registry import find_model
from app.engine.modules.attention import KERNELS
from app.engine.quantization.formats import FORMATS
from app.engine.race import measure
from app.engine.race.results import choose, faults

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

KLEIN = find_model("flux.2-klein-4b").architecture


@pytest.fixture(scope="module")
def held(card, tmp_path_factory):
    """One race, with its cache, seconds and most bytes."""
    cache = tmp_path_factory.mktemp("cache")
    torch.zeros(1, device=card)  # torch counts nothing before its first use of the card
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(card)
    reserved, allocated = torch.cuda.memory_reserved(card), torch.cuda.memory_allocated(card)
    begun = time.perf_counter()
    results = measure.race(card, KLEIN, cache, has_kernels=True)
    seconds = time.perf_counter() - begun
    logging.getLogger(__name__).info("%.1f s: %s; %s", seconds, choose(results), results)
    peak = torch.cuda.max_memory_reserved(card) - reserved
    return results, cache, seconds, peak, torch.cuda.memory_allocated(card) - allocated


def test_it_costs_little(held):
    """15 s and 256 MB at most, and gives back what it took."""
    _, _, seconds, peak, kept = held

    assert seconds <= 15
    assert peak <= 256_000_000
    assert kept < 80_000_000  # cuBLAS's workspaces


def test_every_format_and_kernel_has_times_or_a_reason(held):
    """And of those that run, an error within its bound."""
    results = held[0]
    laps = {lap.name: lap for lap in results.linears}

    assert laps["bf16"].seconds
    assert {lap.name for lap in results.attention} == set(KERNELS)
    for lap in (*results.linears, *results.attention):
        assert (lap.seconds is None) == bool(lap.fault)
        assert lap.error is None or lap.error <= lap.bound
    assert (laps["fp8"].seconds is not None) == (results.capability >= (8, 9))


def test_the_times_are_those_of_the_cards_arithmetic(held):
    """On Hopper fp8 wins its part, and cuDNN or the kernel with values in fp8 the other."""
    results = held[0]
    if results.capability != (9, 0) or results.disturbed:
        pytest.skip("known for Hopper only")
    times = results.milliseconds

    assert choose(results).linears == "fp8"
    assert choose(results).attention in ("cudnn", "fp8")
    assert 15 < times["linears"]["fp8"] < 30 < times["linears"]["bf16"] < 50
    assert 7 < times["attention"]["cudnn"] < 15


def test_it_is_held_once(card, held, monkeypatch):
    """The second start reads what the first one kept."""
    results, cache, *_ = held
    if results.disturbed:
        pytest.skip("others used the card, so nothing is kept")
    monkeypatch.setattr(measure, "hold", lambda *_, **__: pytest.fail("held again"))

    assert measure.race(card, KLEIN, cache, has_kernels=True) == results


def test_the_choice_runs(card, held):
    """The format that was taken multiplies, and the kernel attends."""
    chosen = choose(held[0])
    q = torch.randn(3, 1, KLEIN.heads, 256, KLEIN.head_size, device=card, dtype=torch.bfloat16)

    assert KERNELS[chosen.attention].call(*q).shape == q.shape[1:]
    if chosen.linears:
        weight = torch.randn(512, KLEIN.width, device=card)
        layer = FORMATS[chosen.linears].build(weight, torch.bfloat16)
        assert layer(torch.randn(64, KLEIN.width, device=card).bfloat16()).shape == (64, 512)
    assert chosen.linears not in faults(held[0].linears)
