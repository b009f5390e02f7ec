"""What is chosen from a race, with made-up times of cards that nobody here has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.engine.race.results import Lap, Results, choose, faults, settle

BF16 = Lap("bf16", 0.0, is_reference=True)
FP8 = Lap("fp8", 0.0, 0.0375, 0.04)
INT8 = Lap("int8", 0.0, 0.0128, 0.04, must_win=True)
TORCH = Lap("torch", 0.0, 0.002, 0.08)
CUDNN = Lap("cudnn", 0.0, 0.002, 0.08)
KITCHEN = Lap("int8", 0.0, 0.027, 0.03, is_challenger=True)
GONE = "comfy-kitchen is not installed"
NO_FP8 = replace(FP8, seconds=None, error=None, fault="fp8's product does not run here")
NO_CUDNN = replace(CUDNN, seconds=None, error=None, fault="it is written for Hopper and newer")


def lap(of: Lap, ms: float) -> Lap:
    return replace(of, seconds=ms / 1e3)


def card(capability, linears, attention, **more: object) -> Results:
    return Results(capability, linears, attention, **more)


RTX_3060 = card(
    (8, 6),
    (NO_FP8, lap(INT8, 350), lap(BF16, 1300)),
    (lap(KITCHEN, 90), NO_CUDNN, lap(TORCH, 300)),
)
RTX_4070 = card(
    (8, 9),
    (lap(FP8, 290), lap(INT8, 160), lap(BF16, 560)),
    (lap(KITCHEN, 40), NO_CUDNN, lap(TORCH, 130)),
)
H100 = card(
    (9, 0),
    (lap(FP8, 19.3), lap(INT8, 36), lap(BF16, 35)),
    (lap(KITCHEN, 18.1), lap(CUDNN, 9.9), lap(TORCH, 19.6)),
)


def without_library(results: Results) -> Results:
    """The same card where comfy-kitchen is missing."""
    parts = [
        tuple(
            replace(each, seconds=None, error=None, fault=GONE) if each.name == "int8" else each
            for each in part
        )
        for part in (results.linears, results.attention)
    ]
    return replace(results, linears=parts[0], attention=parts[1])


@pytest.mark.parametrize(
    ("results", "linears", "attention", "said"),
    [
        (RTX_3060, "int8", "int8", "the fastest that keeps its bound; timed here, ms a step: int8"),
        (RTX_4070, "int8", "int8", "int8 160.0, fp8 290.0, bf16 560.0; attention int8 40.0, torch"),
        (H100, "fp8", "cudnn", "nothing else makes a step 3 % faster"),
        (H100, "fp8", "cudnn", "int8 left out: 1.03 times bf16's time on this card"),
        (without_library(RTX_3060), "", "torch", f"int8 left out: {GONE}"),
        (without_library(RTX_4070), "fp8", "torch", f"int8 left out: {GONE}"),
    ],
    ids=["3060", "4070", "H100", "H100's int8", "3060 without", "4070 without"],
)
def test_the_fastest_that_keeps_its_bound_is_taken(results, linears, attention, said):
    """On each card another, and the times are told with it."""
    chosen = choose(results)

    assert (chosen.linears, chosen.attention) == (linears, attention)
    assert said in chosen.reason


def test_a_card_in_use_decides_nothing():
    """The order that holds without times is taken, and the reason says so."""
    used = "others used 87 % of it"
    chosen = choose(replace(RTX_4070, disturbed=used))
    slow = (NO_FP8, lap(INT8, 1350), lap(BF16, 1300))
    ampere = choose(replace(RTX_3060, linears=slow, disturbed=used))

    assert (chosen.linears, chosen.attention) == ("fp8", "torch")
    assert (ampere.linears, ampere.attention) == ("int8", "torch")
    assert chosen.reason.startswith(
        f"chosen without the times, since the card was disturbed twice: {used}; "
    )


@pytest.mark.parametrize(
    ("int8", "kitchen", "expected"),
    [
        (95.9, 51.0, ("fp8", "torch")),
        (92.0, 51.0, ("int8", "torch")),
        (100.1, 42.0, ("fp8", "int8")),
        (96.0, 46.0, ("fp8", "torch")),
        (90.0, 46.0, ("int8", "torch")),
        (60.0, 20.0, ("int8", "int8")),
    ],
)
def test_each_exchange_makes_the_step_five_percent_faster(int8, kitchen, expected):
    """Of fp8's 100 ms and attention's 50; less is within what two runs differ by."""
    linears = (lap(FP8, 100), lap(INT8, int8), lap(BF16, 200))
    chosen = choose(card((8, 9), linears, (lap(KITCHEN, kitchen), lap(TORCH, 50))))

    assert (chosen.linears, chosen.attention) == expected


@pytest.mark.parametrize(
    ("error", "said"),
    [(0.041, "its error of 4.1% is more than 4%"), (float("nan"), "its error of nan% is more")],
)
def test_what_is_not_right_is_not_taken_however_fast(error, said):
    """Nor what gives no number at all."""
    wrong = (lap(FP8, 290), replace(lap(INT8, 1), error=error), lap(BF16, 560))
    chosen = choose(replace(RTX_4070, linears=wrong))

    assert chosen.linears == "fp8"
    assert faults(wrong)["int8"].startswith(said)
    wrong = (replace(lap(KITCHEN, 1), error=0.031), lap(TORCH, 130))
    assert choose(replace(RTX_4070, attention=wrong)).attention == "torch"


def test_what_is_named_by_hand_is_not_weighed():
    """The other part is still chosen by the times."""
    chosen = choose(RTX_4070, attention="torch")

    assert (chosen.linears, chosen.attention) == ("int8", "torch")


@pytest.mark.parametrize(
    ("disturbed", "held", "waits"),
    [([False], 1, 0), ([True, False], 2, 1), ([True, True], 2, 1)],
)
def test_a_disturbed_race_is_repeated_once(disturbed, held, waits):
    """After a while; then what it says of itself holds."""
    races = [replace(H100, disturbed="others" if each else "") for each in disturbed]
    left, waited = list(races), []

    assert settle(lambda: left.pop(0), lambda: waited.append(1)) is races[-1]
    assert (held - len(races) + len(left), len(waited)) == (0, waits)
