"""Which layer the text encoder has: the plain one, unless a card runs the other and gains."""

from __future__ import annotations

import logging

import pytest
import torch

from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer
from app.engine.quantization.formats import FORMATS
from app.engine.race import encoder
from app.engine.race.encoder import choose_layer
from app.engine.race.kept import CARD
from app.engine.race.results import Lap, Results

pytestmark = pytest.mark.torch

KLEIN = {"qkv": (6144, 2560), "out": (2560, 4096), "up": (19456, 2560), "down": (2560, 9728)}


def test_a_processor_has_the_plain_layer():
    """Nothing is timed there."""
    device = torch.device("cpu")

    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 512, device, None) is EncoderLayer


@pytest.fixture
def card(monkeypatch):
    """A card on which both layers take the seconds, and make the errors, that a test appends."""
    found: list[Results] = []
    monkeypatch.setattr(encoder, "triton_fault", lambda: "")
    monkeypatch.setattr(encoder, "_hold", lambda *_: found.pop(0))
    monkeypatch.setattr(encoder, "card_key", lambda device, **facts: {CARD: "a card"} | facts)
    return found


def timed(plain_s: float, wide_s: float, error: float = 1e-3, disturbed: str = "") -> Results:
    laps = Lap("plain", plain_s), Lap("int8 in two terms", wide_s, error, bound=0.02)
    return Results((9, 0), laps, (), disturbed)


def chosen(cache, shapes=KLEIN) -> type[EncoderLayer]:
    return choose_layer(FORMATS["int8w"], shapes, 128, 512, torch.device("cuda", 0), cache)


@pytest.mark.parametrize(
    ("results", "layer"),
    [
        (timed(5e-4, 2e-4), WideEncoderLayer),
        (timed(5e-4, 4.9e-4), EncoderLayer),
        (timed(5e-4, 2e-4, error=0.03), EncoderLayer),
        (timed(5e-4, 2e-4, error=float("nan")), EncoderLayer),
    ],
)
def test_a_layer_has_to_be_right_and_faster(card, results, layer):
    """By more than runs differ."""
    card.append(results)

    assert chosen(None) is layer


def test_a_later_start_has_the_layer_of_the_first(card, tmp_path):
    """However long it takes then: a seed's pixels stay. Other sizes are timed for themselves."""
    card += [timed(5e-4, 2e-4), timed(5e-4, 6e-4)]

    assert chosen(tmp_path) is WideEncoderLayer
    assert chosen(tmp_path) is WideEncoderLayer
    assert len(card) == 1
    assert chosen(tmp_path, KLEIN | {"up": (2 * 9600, 2560)}) is EncoderLayer


def test_times_beside_another_program_decide_nothing(card, tmp_path):
    """The layer that is faster on every card that was seen is taken, if it is right; next time
    they are timed again."""
    card += 2 * [timed(5e-4, 6e-4, disturbed="equal runs differed by 40%")]
    card += [timed(5e-4, 6e-4)]

    assert chosen(tmp_path) is WideEncoderLayer
    assert chosen(tmp_path) is EncoderLayer


@pytest.mark.gpu
def test_a_card_has_the_layer_that_is_faster(caplog):
    """At klein's sizes; odd ones, and weights that are not int8, leave no choice."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        chosen = choose_layer(FORMATS["int8w"], KLEIN, 128, 512, device, None)

    assert "A layer of the text encoder takes" in caplog.text
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert chosen is WideEncoderLayer
    assert choose_layer(FORMATS["plain"], KLEIN, 128, 512, device, None) is EncoderLayer
    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 500, device, None) is EncoderLayer
