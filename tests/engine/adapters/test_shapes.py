"""The shapes that adapters are checked against are those of the networks that are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from app.engine.adapters.shapes import linear_shapes
from app.engine.models.registry import MODELS

_KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "in_channels": 128,
    "guidance_embeds": False,
}


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_of_diffusers_network(model) -> None:
    """Every linear layer, and no other; klein's config is as published."""
    from diffusers import Flux2Transformer2DModel

    entry = MODELS[model]
    config = _KLEIN
    if entry.folder is not None:
        text = (entry.folder / "transformer" / "config.json").read_text()
        config = {name: value for name, value in json.loads(text).items() if name[0] != "_"}
    with torch.device("meta"):
        network = Flux2Transformer2DModel(**config)

    assert linear_shapes(entry.architecture) == {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
