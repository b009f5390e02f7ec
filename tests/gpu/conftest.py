"""What the tests on a card share: the card, and the full-size random checkpoint.

.venv/bin/pytest -m gpu tests/gpu
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def card():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no card")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def checkpoint(card):
    """klein 4B's shapes with random weights, the transformer in fp8; the benchmark's, if there."""
    folder = Path(tempfile.gettempdir()) / "klein-random"
    if not (folder / "model_index.json").is_file():
        tool = str(ROOT / "tools" / "make_checkpoint.py")
        command = [sys.executable, tool, str(folder), "--fp8", "--device", "cuda"]
        subprocess.run(command, check=True)
    return folder
