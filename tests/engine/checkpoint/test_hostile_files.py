"""Weights of anyone's: whatever a file says of itself, the start ends with one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.checkpoint.detect import open_checkpoint
from app.engine.checkpoint.files import read_config
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.errors import StartupError
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch


def write(path: Path, head: bytes, data: bytes = b"") -> Path:
    """A file with this head, whatever it is."""
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def refused(ask) -> str:
    """The one sentence that *ask* ends with."""
    with pytest.raises(StartupError) as error:
        ask()
    message = error.value.message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"' + b"X" * 10_000 + b'","shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=["recursing", "negative", "overflowing", "other size", "unknown type"],
)
def test_a_head_that_is_none_is_one_sentence(tmp_path, head) -> None:
    """It names the file."""
    path = write(tmp_path / "model.safetensors", head, bytes(4))

    assert "model.safetensors" in refused(lambda: SafetensorsFile(path))


def test_a_file_of_another_kind_is_one_sentence(tmp_path) -> None:
    """Empty, or shorter than the length of its head."""
    for content in (b"", b"1234567", bytes(8)):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        assert "not a whole safetensors file" in refused(lambda path=path: SafetensorsFile(path))


@pytest.fixture
def single(tiny_klein, tmp_path):
    """A folder whose transformer is one fp8 file, and a way to change that file."""
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    path = write_fp8(folder, folder / "fp8.safetensors")
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    shutil.copy(tiny_klein / "transformer" / "config.json", folder / "transformer")
    with SafetensorsFile(path) as file:
        notes = file.metadata

    def change(tensors=None, **metadata: str) -> Path:
        save_file(load_file(path) | (tensors or {}), path, metadata=notes | metadata)
        return folder

    return change


def test_it_opens_as_it_is(single) -> None:
    """What the others change is what they are refused for."""
    open_checkpoint(single()).files.close()


@pytest.mark.parametrize(
    "notes",
    [
        "[" * 100_000,
        '{"layers": ' + '{"a":' * 50_000,
        '{"layers": {"double_blocks.0.img_attn.qkv": 1}}',
        '{"layers": [1]}',
        "{",
        "[]",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_notes_in_the_header_are_judged_too(single, notes) -> None:
    """They are JSON within JSON."""
    folder = single(_quantization_metadata=notes)

    assert "fp8.safetensors" in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    "note",
    [b"[" * 60_000, b"{", b"1", b"\xff" * 8, b" " * 70_000],
    ids=["recursing", "cut", "number", "no text", "long"],
)
def test_notes_in_tensors_are_judged_too(single, note) -> None:
    """ComfyUI's way: JSON in bytes."""
    raw = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    folder = single({"double_blocks.0.img_attn.qkv.comfy_quant": raw})

    assert "fp8.safetensors" in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    "name",
    ["double_blocks.999999999999.x", "single_blocks.x.y", "double_blocks."],
)
def test_layers_are_counted_within_reason(single, tmp_path, name) -> None:
    """A number in a name makes no list of its length, and one that is none no traceback."""
    folder = single({name: torch.zeros(1)})
    comfy = tmp_path / "comfy"
    (comfy / "diffusion_models").mkdir(parents=True)
    shutil.move(folder / "fp8.safetensors", comfy / "diffusion_models" / "klein.safetensors")
    shutil.copytree(folder / "tokenizer", comfy / "tokenizer")
    for part, place in (("text_encoder", "text_encoders"), ("vae", "vae")):
        (comfy / place).mkdir()
        found = next((folder / part).glob("*.safetensors"))
        shutil.copy(found, comfy / place / "one.safetensors")

    assert refused(lambda: open_checkpoint(comfy))


def test_a_config_with_more_layers_than_the_file_has_tensors_is_refused(single) -> None:
    """Before names are made for each of them."""
    folder = single()
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 10**12}))

    assert "fp8.safetensors" in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, " " * 17_000_000, "{"])
def test_configs_are_judged_too(tmp_path, content) -> None:
    """Deep, long or cut: the same sentence."""
    path = tmp_path / "config.json"
    path.write_text(content)

    assert "is not valid JSON" in refused(lambda: read_config(path))


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": [1]}', "[" * 100_000])
def test_an_index_is_judged_too(tiny_klein, tmp_path, index) -> None:
    """The list of a folder's files is one of these configs."""
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(index)

    assert refused(lambda: open_checkpoint(folder))


@pytest.mark.full
def test_a_converted_file_that_is_damaged_in_its_head_is_made_anew(tiny_klein, tmp_path) -> None:
    """Our own kept weights are read by the same rules; a bad head costs the time to round again."""
    from tests.support.layout_files import build

    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    build(folder, quantized_cache=tmp_path / "cache")
    for path in (tmp_path / "cache" / "converted").iterdir():
        write(path, b"[" * 100_000)
    build(folder, quantized_cache=tmp_path / "cache")

    for path in (tmp_path / "cache" / "converted").iterdir():
        assert load_file(path)


def test_a_fault_of_our_own_is_told_with_its_traceback(tiny_klein, monkeypatch, caplog) -> None:
    """The sentence blames the files; the log shows where it came from, without being asked."""

    def fail(*_, **__) -> None:
        raise KeyError("a slip")

    monkeypatch.setattr("app.engine.checkpoint.detect._open_diffusers", fail)
    with caplog.at_level("INFO"), pytest.raises(StartupError, match="does not fit together"):
        open_checkpoint(Path(tiny_klein))

    assert "a slip" in caplog.text
    assert "Traceback" in caplog.text
