"""Weights reach the card by pinned memory, in pieces and on several threads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from app.engine.checkpoint.safetensors_io import SafetensorsFile

pytestmark = [pytest.mark.torch, pytest.mark.gpu]


def test_every_byte_arrives(card, tmp_path):
    """Several times as many pieces as there are buffers, a rest, and one number."""
    tensors = {
        "large": torch.randint(0, 256, (123_456_789,), dtype=torch.uint8),
        "small": torch.randn(7).bfloat16(),
        "one": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        for _ in range(3):
            for name, expected in tensors.items():
                made = file.read(file.tensors[name], card)
                # A kernel in the stream that the copies are in sees them.
                assert torch.equal(made, expected.to(card))
