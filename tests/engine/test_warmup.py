"""A model that is whole on disk and draws nothing does not pass for one that is ready."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.domain import Generated, RawImage
from app.engine import warmup
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.models.registry import find_spec
from app.errors import StartupError
from tests.support.spoilt_weights import not_numbers, spoil, zeroes

pytestmark = pytest.mark.torch


@pytest.fixture
def model(tiny_klein: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(tiny_klein, tmp_path / "model"))


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("vae", zeroes),
        pytest.param("vae", not_numbers, marks=pytest.mark.full),
        pytest.param("transformer", not_numbers, marks=pytest.mark.full),
    ],
)
def test_a_warm_up_picture_that_shows_nothing_ends_the_start(model, tmp_path, part, damage) -> None:
    """One sentence: what is likely wrong, how to find out, and what to try."""
    spoil(model, part, damage)
    engine = KleinEngine(EngineConfig("flux.2-klein-4b", str(model), str(tmp_path), None))

    with pytest.raises(StartupError, match="warm-up picture shows nothing") as refused:
        engine.load(lambda _: None)
    engine.close()
    assert "klein download --verify" in refused.value.message
    assert "KLEIN_PRECISION=bf16" in refused.value.message


def one_row(tensor: torch.Tensor) -> torch.Tensor:
    """Where a single overflow would spoil but a part of the picture."""
    spoilt = tensor.clone()
    spoilt[..., :1, :] = float("nan")
    return spoilt


def test_a_picture_of_which_a_part_is_no_number_ends_the_start(
    tiny_klein, tmp_path, monkeypatch
) -> None:
    """Bytes would hide it: what is no number becomes black."""
    from app.engine import engine as engine_module

    decode = engine_module.decode
    monkeypatch.setattr(engine_module, "decode", lambda *given: one_row(decode(*given)))
    engine = KleinEngine(EngineConfig("flux.2-klein-4b", str(tiny_klein), str(tmp_path), None))

    with pytest.raises(StartupError, match="warm-up picture shows nothing"):
        engine.load(lambda _: None)
    engine.close()


def test_what_is_measured_is_making_the_picture_and_not_looking_at_it(monkeypatch) -> None:
    """The seconds are what callers' waits are predicted from."""
    now = 0.0

    def make(spec) -> Generated:
        nonlocal now
        now += 2.0
        return SimpleNamespace(image=RawImage(1, 2, bytes(range(6))))

    def look_at(image) -> None:
        nonlocal now
        now += 100.0

    monkeypatch.setattr(warmup, "_look_at", look_at)
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now)
    model = find_spec("flux.2-klein-4b")
    device = torch.device("cuda")

    assert warmup.warm_up(model, device, make, lambda _: None, nullcontext(())) == 2.0
