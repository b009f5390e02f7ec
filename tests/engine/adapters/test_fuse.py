"""Adapters that are added to the weights: the same change, kept at 8 bit, cached by themselves."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.domain import Lora
from app.engine.adapters.fuse import fuse
from app.engine.checkpoint.detect import open_checkpoint
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.hub import download
from app.engine.load import _find, load
from app.engine.models.registry import find_spec
from app.engine.quantization.select import GpuCapabilities, choose_precision
from app.errors import StartupError
from tests.engine.adapters import forge
from tests.engine.adapters.test_active import MODEL, distance_db, latents, use
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def lora(tiny_klein, tmp_path_factory) -> Lora:
    """An adapter of all layers, a few per cent of the weights' norm."""
    opened = open_checkpoint(tiny_klein)
    with opened.files:
        shapes = opened.transformer.linear_shapes
    weak = {name: (down, up * 0.02) for name, (down, up) in forge.draw(shapes, 4).items()}
    path = tmp_path_factory.mktemp("loras") / "a.safetensors"
    forge.write(path, *forge.layouts(weak, 2.0)["ai-toolkit"])
    return use(path, 0.8)


def start(folder: Path, cache: Path, precision: str, *fused: Lora) -> KleinEngine:
    """Load *folder* with adapters *fused*, without a warm-up."""
    config = EngineConfig(MODEL, str(folder), str(cache), None, precision, lora_fuse=fused)
    engine = KleinEngine(config)
    engine._started = load(config, find_spec(MODEL), lambda _: None)
    return engine


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp8", "fp32", "int8"])
def test_a_fused_adapter_is_the_adapter(tiny_klein, lora, tmp_path, precision) -> None:
    """In float32 to rounding; in 8 bit it costs no accuracy, in the mean of a few pictures."""
    exact, fused = start(tiny_klein, tmp_path, "fp32"), start(tiny_klein, tmp_path, precision, lora)
    plain = start(tiny_klein, tmp_path, precision)
    errors: dict[str, list[float]] = {"fused": [], "plain": []}
    for seed in range(4):
        right = latents(exact, lora, seed=seed)
        errors["fused"].append(distance_db(latents(fused, seed=seed), right))
        alone = latents(exact, seed=seed), latents(plain, seed=seed)
        errors["plain"].append(distance_db(alone[1], alone[0]))

    assert distance_db(alone[0], right) < 30
    if precision == "fp32":
        assert min(errors["fused"]) > 90
    else:
        assert sum(errors["fused"]) / 4 > sum(errors["plain"]) / 4 - 1


@pytest.mark.full
def test_the_cache_keeps_fused_weights_apart(tiny_klein, lora, tmp_path) -> None:
    """Another scale, or none, finds nothing of the others; the same finds its own."""
    wanted = ((), (lora,), (replace(lora, scale=0.2),), (lora,), ())
    first, one, weak, again, last = (
        latents(start(tiny_klein, tmp_path, "int8", *loras)) for loras in wanted
    )

    assert np.array_equal(one, again)
    assert np.array_equal(first, last)
    assert not np.array_equal(one, weak)
    assert len(list((tmp_path / "converted").glob("transformer-int8-*"))) == 3


def test_8_bit_weights_are_refused(tiny_klein, lora, tmp_path) -> None:
    """Rounding them again would lose the adapter; the sentence says what to take."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_klein, folder)
    path = write_fp8(folder, folder / "fp8.safetensors")

    with pytest.raises(StartupError, match="use the bf16 file, or KLEIN_LORAS"):
        start(path, tmp_path, "fp8", lora)


def test_it_downloads_no_second_file_for_it(lora, tmp_path, monkeypatch) -> None:
    """With only the fp8 file there, the start ends with the command that gets the other."""
    monkeypatch.setattr(
        download, "missing_bytes", lambda _, __, kind: 0 if kind == "fp8" else 7_800_000_000
    )
    config = EngineConfig(MODEL, None, str(tmp_path), 0, "fp8", lora_fuse=(lora,))
    facts = GpuCapabilities((9, 0), frozenset(("fp8",)))

    with pytest.raises(StartupError, match="klein download --precision bf16"):
        _find(config, choose_precision("fp8", facts, is_small=False), lambda _: None)


def test_a_damaged_adapter_ends_the_start(tiny_klein, lora, tmp_path) -> None:
    """With the sentence that names the file."""
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"nothing")
    damaged = replace(lora, path=str(path), sha256=hashlib.sha256(b"nothing").hexdigest())
    opened = open_checkpoint(tiny_klein)
    with opened.files, pytest.raises(StartupError, match=r"b\.safetensors cannot be used"):
        fuse(opened.transformer, [damaged])


def test_the_sum_is_made_in_float32(tiny_klein, lora) -> None:
    """What a small change adds to a bf16 weight is not rounded away before quantization."""
    opened = open_checkpoint(tiny_klein)
    with opened.files:
        part = fuse(opened.transformer, [lora])
        name = "transformer_blocks.0.attn.to_q.weight"

        assert part.slots[name].read(torch.device("cpu")).dtype is torch.float32
