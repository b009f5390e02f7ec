"""Which arithmetic is taken, and what the choice says for itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch")

from app.engine.quantization.select import GpuCapabilities, choose_precision, vae_dtype

pytestmark = pytest.mark.torch

ADA = GpuCapabilities((8, 9), frozenset(["fp8"]))
AMPERE = GpuCapabilities((8, 6), frozenset(["int8"]), {"fp8": "it has no such units"})
SLOW = GpuCapabilities((8, 6), frozenset(), {"fp8": "-", "int8": "1.10 times bf16's time"})


@pytest.mark.parametrize(
    ("asked", "facts", "linears", "said"),
    [
        ("auto", ADA, "fp8", "sm_89 multiplies in fp8"),
        ("auto", AMPERE, "int8", "faster than in bf16"),
        ("auto", SLOW, "fp8w", "memory, not time"),
        ("auto", SLOW, "fp8w", "for the memory (int8: 1.10 times bf16's time); fp8 weights"),
        ("fp8", AMPERE, "fp8w", "memory, not time"),
        ("int8", ADA, "int8", "as asked for"),
        ("bf16", ADA, "bf16", "as asked for"),
    ],
)
def test_the_card_and_its_probes_decide(asked, facts, linears, said):
    """Fp8 where it multiplies, int8 where it is faster, and the reason with either."""
    chosen = choose_precision(asked, facts, is_small=False)

    assert chosen.linears.name == linears
    assert said in chosen.reason


def test_a_small_model_is_not_rounded():
    """The demo and the tests' models stay exact, unless asked otherwise."""
    assert choose_precision("auto", ADA, is_small=True).linears.is_exact
    assert choose_precision("fp8", ADA, is_small=True).linears.name == "fp8"


def test_the_encoder_keeps_its_activations():
    """Only its weights are rounded: its output suffers from anything more."""
    for asked, facts in (("fp8", ADA), ("auto", SLOW), ("int8", AMPERE)):
        chosen = choose_precision(asked, facts, is_small=False)
        assert chosen.encoder_linears.name == "int8w"


@pytest.mark.parametrize(("device", "expected"), [("cuda", "bfloat16"), ("cpu", "float32")])
def test_the_vae_computes_in_bfloat16_on_a_card_only(device, expected):
    """A processor would take 80 times as long for it."""
    chosen = choose_precision("bf16", ADA, is_small=False)

    assert vae_dtype(chosen, torch.device(device)) is getattr(torch, expected)
