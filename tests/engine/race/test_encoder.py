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
from app.engine.race.kept import CARD, race_once, recall
from app.engine.race.results import Lap, Results
from tests.engine.race.test_results import H100

pytestmark = pytest.mark.torch

KLEIN = {"qkv": (6144, 2560), "out": (2560, 4096), "up": (19456, 2560), "down": (2560, 9728)}


def test_a_processor_has_the_plain_layer():
    """Nothing is timed there."""
    device = torch.device("cpu")

    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 512, device, None) is EncoderLayer


class Card:
    """One on which the layers differ by *error*, and take *times*, plain and other, each once."""

    name, error = "a card", 1e-3

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def trials(self, *_):
        return [lambda: torch.ones(1, 4), lambda: torch.full((1, 4), 1 + self.error)]

    def hold(self, *_):
        plain_s, wide_s = self.times.pop(0)
        return Results((9, 0), (Lap("bf16", plain_s), Lap("int8", wide_s)), ())


@pytest.fixture
def card(monkeypatch):
    made = Card()
    monkeypatch.setattr(encoder, "triton_fault", lambda: "")
    monkeypatch.setattr(encoder, "_trials", made.trials)
    monkeypatch.setattr(encoder, "_hold", made.hold)
    monkeypatch.setattr(encoder, "card_key", lambda device, **facts: {CARD: made.name} | facts)
    return made


CUDA = torch.device("cuda", 0)
FAST, SLOW = (5e-4, 2e-4), (5e-4, 4.9e-4)


def chosen(cache, shapes=KLEIN, tokens=512) -> type[EncoderLayer]:
    return choose_layer(FORMATS["int8w"], shapes, 128, tokens, CUDA, cache)


@pytest.mark.parametrize(
    ("times", "error", "layer"),
    [
        (FAST, 1e-3, WideEncoderLayer),
        (SLOW, 1e-3, EncoderLayer),
        (FAST, 0.03, EncoderLayer),
        (FAST, float("nan"), EncoderLayer),
    ],
)
def test_a_layer_has_to_be_right_and_faster(card, caplog, times, error, layer):
    """By more than runs differ; one that is wrong is not even timed."""
    card.times, card.error = [times], error

    assert chosen(None) is layer
    assert len(card.times) == ("are wrong here" in caplog.text) == (not error < 0.02)


def test_a_later_start_has_the_layer_of_the_first(card, tmp_path, caplog):
    """However long it takes then: a seed's pixels stay, and the log says which it is."""
    card.times = [FAST, SLOW]
    caplog.set_level(logging.INFO)

    assert [chosen(tmp_path), chosen(tmp_path)] == [WideEncoderLayer, WideEncoderLayer]
    assert len(card.times) == 1
    assert caplog.text.count("0.50 ms, 0.20 ms in int8 with an error of 1.0e-03: int8.") == 2


def test_one_that_has_become_wrong_is_left_out(card, tmp_path):
    """It is tried at each start, whatever was kept."""
    card.times = [FAST]

    assert chosen(tmp_path) is WideEncoderLayer
    card.error = 0.5
    assert chosen(tmp_path) is EncoderLayer


@pytest.mark.parametrize(
    "other", [{"tokens": 1024}, {"shapes": KLEIN | {"up": (2 * 9600, 2560)}}, {"name": "another"}]
)
def test_other_layers_and_cards_are_timed_for_themselves(card, tmp_path, other):
    """The times of one say nothing of another."""
    card.times = [FAST, SLOW]
    first = chosen(tmp_path)
    card.name = other.pop("name", card.name)

    assert first is WideEncoderLayer
    assert chosen(tmp_path, **other) is EncoderLayer
    assert not card.times


def test_the_times_stand_beside_the_race_until_they_are_forgotten(card, tmp_path):
    """In a file of their own, so that neither takes the other's place."""
    card.times = [FAST, SLOW]
    race_once(tmp_path, {CARD: card.name}, lambda: H100)
    chosen(tmp_path)

    assert recall(tmp_path, {CARD: card.name}) == H100
    names = {each.name for each in (tmp_path / "race").glob("*.json")}
    assert names == {"a-card.json", "a-card-text-encoder.json"}

    encoder.forget(CUDA, tmp_path)
    assert chosen(tmp_path) is EncoderLayer
    assert recall(tmp_path, {CARD: card.name}) == H100


@pytest.mark.gpu
def test_a_card_has_the_layer_that_is_faster(caplog, monkeypatch, tmp_path):
    """At klein's sizes, once; odd ones, and weights that are not int8, leave no choice."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        taken = chosen(tmp_path)
    monkeypatch.setattr(encoder, "_hold", lambda *_: pytest.fail("it was timed again"))
    assert chosen(tmp_path) is taken

    assert "A layer of the text encoder takes" in caplog.text
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert taken is WideEncoderLayer
    assert choose_layer(FORMATS["plain"], KLEIN, 128, 512, device, None) is EncoderLayer
    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 500, device, None) is EncoderLayer
