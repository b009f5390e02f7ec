"""Which layer the text encoder has: the plain one, unless a card runs the other and gains."""

from __future__ import annotations

import logging

import pytest
import torch

from app.engine.modules.qwen3_layers import EncoderLayer
from app.engine.modules.wide_encoder import WideEncoderLayer
from app.engine.quantization.formats import FORMATS
from app.engine.race.encoder import choose_layer

pytestmark = pytest.mark.torch

KLEIN = {"qkv": (6144, 2560), "out": (2560, 4096), "up": (19456, 2560), "down": (2560, 9728)}


def test_a_processor_has_the_plain_layer():
    """Nothing is timed there."""
    device = torch.device("cpu")

    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 512, device) is EncoderLayer


@pytest.mark.gpu
def test_a_card_has_the_layer_that_is_faster(caplog):
    """At klein's sizes; odd ones, and weights that are not int8, leave no choice."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        chosen = choose_layer(FORMATS["int8w"], KLEIN, 128, 512, device)

    assert "A layer of the text encoder takes" in caplog.text
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert chosen is WideEncoderLayer
    assert choose_layer(FORMATS["plain"], KLEIN, 128, 512, device) is EncoderLayer
    assert choose_layer(FORMATS["int8w"], KLEIN, 128, 500, device) is EncoderLayer
