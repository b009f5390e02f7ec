"""A test for each kind of bad checkpoint: refused at load with a sentence that says why."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.errors import StartupError
from tests.checkpoints import write_tiny_klein

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path):
    return write_tiny_klein(tmp_path)


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


def test_a_folder_of_something_else_is_refused(tmp_path):
    """No model there: the sentence says what would be one."""
    assert "model_index.json" in refusal(tmp_path)
    assert "no model at" in refusal(tmp_path / "nowhere")
