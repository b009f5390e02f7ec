"""Rounded layers are kept on disk: a later start reads them, and only them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.hub import disk
from app.engine.quantization.builder import QuantizedLinearBuilder
from tests.support.checkpoints import write_tiny_klein
from tests.support.layout_files import build
from tests.support.long_form import one_of
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tiny_klein, tmp_path):
    return Path(shutil.copytree(tiny_klein, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch):
    """The names of all tensors that are read, by file."""
    seen: dict[str, set[str]] = {}
    plain = SafetensorsFile.read

    def watch(self, tensor, *where):
        seen.setdefault(self.path.parent.name, set()).add(tensor.name)
        return plain(self, tensor, *where)

    monkeypatch.setattr(SafetensorsFile, "read", watch)
    return seen


def state(components) -> dict[str, torch.Tensor]:
    return {f"encoder.{name}": value for name, value in components.encoder.state_dict().items()} | {
        f"transformer.{name}": value for name, value in components.transformer.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.float(), other[name].float()) for name, value in one.items()
    )


@pytest.mark.parametrize("kind", one_of("fp8", "fp8w", "int8"))
def test_a_later_start_gets_the_same_layers_without_the_large_files(folder, cache, read, kind):
    """Bit by bit the same, and of the sources only norms, tables and what stays as it is."""
    first = state(build(folder, quantized_cache=cache, linears=kind))
    assert any("proj" in name for name in read["text_encoder"])
    read.clear()
    again = state(build(folder, quantized_cache=cache, linears=kind))

    assert same(first, again)
    assert not any("proj" in name for name in read["text_encoder"])
    assert not any("attn.to_" in name for name in read["transformer"])
    assert len(read["converted"]) == 2 * (27 * 4 + 2 * 8 + 2 * 2)


def test_it_is_a_plain_safetensors_file(folder, cache):
    """Others can read it; 27 layers with four joined products each, in one byte."""
    build(folder, quantized_cache=cache)
    (path,) = (cache / "converted").glob("encoder-int8w-*.safetensors")
    tensors = load_file(path)

    assert len(tensors) == 27 * 4 * 2
    assert {each.dtype for name, each in tensors.items() if name.endswith("weight")} == {torch.int8}
    assert len(list((cache / "converted").iterdir())) == 2


def test_layers_that_lie_in_8_bit_are_not_kept_again(folder, cache):
    """The published fp8 file is read as it is; only the encoder is converted."""
    build(write_fp8(folder, folder / "fp8.safetensors"), quantized_cache=cache)

    assert [path.name.split("-")[0] for path in (cache / "converted").iterdir()] == ["encoder"]


def test_changed_sources_are_converted_anew(folder, cache):
    """Another size or time of change: what was kept is not believed."""
    build(folder, quantized_cache=cache)
    write_tiny_klein(folder, seed=1)
    right, made = state(build(folder)), state(build(folder, quantized_cache=cache))

    assert same(right, made)
    assert same(right, state(build(folder, quantized_cache=cache)))
    assert len(list((cache / "converted").iterdir())) == 2


@pytest.mark.parametrize("damage", one_of("nonsense", "cut", "empty"))
def test_a_damaged_file_is_made_anew(folder, cache, damage):
    """Whatever happened to it, the next start neither fails nor believes it."""
    right = state(build(folder, quantized_cache=cache))
    for path in (cache / "converted").iterdir():
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-100], "nonsense": b"x" * 500, "empty": b""}[damage])

    assert same(right, state(build(folder, quantized_cache=cache)))
    for path in (cache / "converted").iterdir():
        assert load_file(path)


def test_a_full_disk_costs_time_and_nothing_else(folder, cache, monkeypatch, caplog):
    """The weights are there, one warning is logged, and no half of a file stays."""

    def fail(_):
        raise OSError(28, "No space left on device")

    right = state(build(folder))
    monkeypatch.setattr("os.fsync", fail)

    assert same(right, state(build(folder, quantized_cache=cache)))
    assert list((cache / "converted").iterdir()) == []
    assert "No space left on device" in caplog.text


def test_what_was_written_or_read_is_in_use_until_it_is_released(folder, cache):
    """No pruning takes it from a running service; afterwards it may go."""
    for _ in ("written", "read"):
        build(folder, quantized_cache=cache, linears="int8")
        pruned = disk.prune(cache, 0)
        assert pruned.kept
        assert not pruned.removed
        disk.release()

    assert {each.kind for each in disk.prune(cache, 0).removed} == {disk.Kind.QUANTIZED}


def test_of_several_workers_one_quantizes_and_the_others_wait_for_its_file(
    folder, cache, monkeypatch
):
    """The second build begins while the first has not ended; no weight is read twice."""
    reads: Counter[str] = Counter()
    second: dict[str, torch.Tensor] = {}
    others: list[Thread] = []
    plain, keep = SafetensorsFile.read, QuantizedLinearBuilder.keep

    def count(self, tensor, *where):
        reads[tensor.name] += self.path.is_relative_to(folder)
        return plain(self, tensor, *where)

    def other() -> None:
        second.update(state(build(folder, quantized_cache=cache, linears="fp8")))

    def keep_late(self: QuantizedLinearBuilder) -> None:
        if not others:
            others.append(Thread(target=other))
            others[0].start()
            others[0].join(0.3)
            assert others[0].is_alive()
        keep(self)

    monkeypatch.setattr(SafetensorsFile, "read", count)
    monkeypatch.setattr(QuantizedLinearBuilder, "keep", keep_late)
    first = state(build(folder, quantized_cache=cache, linears="fp8"))
    others[0].join(30)

    assert same(first, second)
    assert {times for name, times in reads.items() if name.endswith("attn.to_q.weight")} == {1}
    assert not list((cache / "converted").glob(".*"))
