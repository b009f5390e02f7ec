"""Tensors are read in pieces, by several threads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from app.engine.checkpoint import safetensors_io
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.errors import StartupError

pytestmark = pytest.mark.torch

TENSORS = {
    "many pieces": torch.randn(37, 11),
    "one piece": torch.randn(3).bfloat16(),
    "one number": torch.tensor(4.5),
    "none": torch.empty(0, 7),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", 64)
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_pieces_come_together_in_order(path):
    """Every byte is in its place, whatever the tensor's size."""
    with SafetensorsFile(path) as file:
        for name, expected in TENSORS.items():
            assert torch.equal(file.read(file.tensors[name]), expected)


def test_a_file_that_is_cut_while_it_is_read_is_refused(path):
    """No thread waits on, and the file can be closed."""
    with SafetensorsFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 1)
        last = max(file.tensors.values(), key=lambda tensor: tensor.start)
        with pytest.raises(StartupError, match="ends before its last tensor"):
            last.read()
