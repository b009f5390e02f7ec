"""A test for each kind of bad checkpoint: refused at load with a sentence that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.errors import StartupError
from tests.support.layout_files import to_comfy
from tests.support.single_files import write_bf16, write_fp8

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tiny_klein, tmp_path):
    return Path(shutil.copytree(tiny_klein, tmp_path / "model"))


def refusal(folder) -> str:
    engine = KleinEngine(EngineConfig("flux.2-klein-4b", str(folder), str(folder), None))
    try:
        with pytest.raises(StartupError) as caught:
            engine.load(lambda _: None)
    finally:
        engine.close()
    return caught.value.message


def edit_config(path, **changes):
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("text_encoder/config.json", {"model_type": "llama", "architectures": ["Llama"]}, "Llama"),
        ("text_encoder/config.json", {"num_hidden_layers": 20}, "20 layers"),
        ("text_encoder/config.json", {"hidden_size": 48}, "hidden size 48"),
        ("vae/config.json", {"latent_channels": 4}, "4 latent channels"),
        ("vae/config.json", {"auto_map": {"x": "y"}}, "auto_map"),
        ("text_encoder/config.json", {"_attn_implementation_internal": "a/b"}, "implementation"),
        ("transformer/config.json", {"num_attention_heads": 4}, "wrong shape"),
        ("transformer/config.json", {"nonsense": 4}, "Flux2Transformer2DModel"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, file, changes, words):
    """The config of another model: the sentence says what was found."""
    edit_config(folder / file, **changes)

    assert words in refusal(folder)


def test_a_vae_without_statistics_is_refused(folder):
    """The VAE of another model has no batch norm; its colours would be washed out."""
    edit_weights(folder / "vae" / WEIGHTS, lambda each: each.pop("bn.running_mean"))

    assert "batch-norm" in refusal(folder)


def test_missing_tensors_are_named(folder):
    """One weight too few: its name is in the sentence."""
    edit_weights(folder / "transformer" / WEIGHTS, lambda each: each.pop("proj_out.weight"))

    assert "proj_out.weight" in refusal(folder)


def test_unknown_tensors_are_named(folder):
    """One weight too many is never dropped silently."""
    edit_weights(folder / "transformer" / WEIGHTS, lambda each: each.update(lora=torch.zeros(1)))

    assert "lora" in refusal(folder)


def test_a_cut_file_is_refused(folder):
    """Half a download is told as such."""
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])

    assert "not a whole safetensors file" in refusal(folder)


def test_pickles_are_not_read(folder):
    """A folder with .bin weights only is refused, since they can run code."""
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin")

    assert "safetensors" in refusal(folder)


def test_tensors_of_the_wrong_shape_are_named(folder):
    """The name, the shape that was found and the one that is needed."""

    def widen(tensors):
        tensors["proj_out.weight"] = torch.zeros(32, 65)

    edit_weights(folder / "transformer" / WEIGHTS, widen)

    assert "proj_out.weight [32, 65] instead of [32, 64]" in refusal(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_only_the_first_few_are_named(folder, part):
    """Five strange tensors: three names and how many more, in whichever part they are."""
    file = "model.safetensors" if part == "text_encoder" else WEIGHTS
    extra = {f"x{number}": torch.zeros(1) for number in range(5)}
    edit_weights(folder / part / file, lambda each: each.update(extra))
    said = refusal(folder)

    assert "x0, x1, x2 and 2 more" in said
    assert part in said


def test_a_single_file_is_checked_as_well(folder):
    """Missing and unknown names of a file in BFL's names."""
    path = write_bf16(folder, folder / "single.safetensors")
    edit_weights(path, lambda each: each.pop("final_layer.linear.weight"))
    assert "proj_out.weight" in refusal(path)
    edit_weights(path, lambda each: each.update(strange=torch.zeros(1)))
    edit_weights(path, lambda each: each.update({"final_layer.linear.weight": torch.zeros(32, 64)}))
    assert "strange" in refusal(path)


@pytest.mark.parametrize("lost", ["weight_scale", "another"])
def test_fp8_without_its_scale_is_refused(folder, lost):
    """Its weights would be silently wrong by a factor of hundreds."""
    path = write_fp8(folder, folder / "fp8.safetensors")
    module = "double_blocks.0.img_attn.qkv"

    def change(tensors):
        if lost == "weight_scale":
            tensors.pop(f"{module}.weight_scale")
        else:
            tensors["double_blocks.9.img_attn.qkv.weight_scale"] = torch.tensor(1.0)

    edit_weights(path, change)
    assert "weight_scale" in refusal(path) or "no such layer" in refusal(path)


@pytest.mark.parametrize("has_notes", [True, False])
def test_fp4_files_are_refused(folder, has_notes):
    """Two weights in a byte, with block scales, as ComfyUI distributes them."""
    path = write_bf16(folder, folder / "fp4.safetensors")

    def change(tensors):
        module = "double_blocks.0.img_attn.qkv"
        rows, columns = tensors[f"{module}.weight"].shape
        tensors[f"{module}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        scale = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_scale_2"] = torch.tensor(1.0)
        if has_notes:
            note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
            tensors[f"{module}.comfy_quant"] = note

    edit_weights(path, change)
    assert "fp4 weights, which are not supported" in refusal(path)


def test_another_8_bit_format_is_refused(folder):
    """A note that names a format of its own is believed."""
    path = write_fp8(folder, folder / "fp8.safetensors", notes={"format": "mxfp8"})

    assert "quantised as mxfp8, which is not supported" in refusal(path)


def test_gguf_files_are_refused(folder):
    """Told by content, whatever the name."""
    for name in ("klein.gguf", "klein.safetensors"):
        path = folder / name
        path.write_bytes(b"GGUF" + bytes(100))
        assert "GGUF file, which is not supported" in refusal(path)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_formats_that_run_code_are_not_opened(folder, monkeypatch, suffix):
    """By their name alone: as the transformer's file, in a part's folder, in ComfyUI's folder."""
    path = folder / f"klein{suffix}"
    path.write_bytes(b"\x80\x04N.")
    comfy = to_comfy(folder, folder / "comfy")
    (weights,) = (comfy / "diffusion_models").iterdir()
    weights.unlink()
    shutil.copy(path, comfy / "diffusion_models")
    opened = Path.open

    def watch(self, *args, **more):
        assert self.suffix != suffix
        return opened(self, *args, **more)

    monkeypatch.setattr(Path, "open", watch)
    assert "its format can run code" in refusal(path)
    assert "its format can run code" in refusal(comfy)
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / f"x{suffix}")
    assert f"but x{suffix}" in refusal(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    """No model there: the sentence says what would be one."""
    assert "model_index.json" in refusal(tmp_path)
    assert "no model at" in refusal(tmp_path / "nowhere")
