"""However a checkpoint lies on disk, the same weights give the same picture."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.engine.checkpoint.detect import open_checkpoint
from app.engine.checkpoint.notes import read_notes
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.checkpoint.transformer import read_transformer
from app.engine.memory.budget import count_weights
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.pipeline.decode import decode
from app.engine.quantization.formats import FORMATS
from app.engine.quantization.linear import Fp8Linear, WeightOnlyLinear
from app.errors import StartupError
from tests.support.layout_files import (
    bfl_vae,
    build,
    fold_scales,
    latents,
    load_model,
    spell_fp8,
    to_comfy,
)
from tests.support.long_form import one_of
from tests.support.single_files import WEIGHTS, write_bf16, write_fp8
from tools.random_weights import TINY, write_random

pytestmark = pytest.mark.torch

SPELLINGS = (
    "published",
    "old",
    "notes",
    "empty notes",
    "prefix",
    "one element",
)


@pytest.fixture(scope="module")
def folder(tiny_klein, tmp_path_factory):
    return Path(shutil.copytree(tiny_klein, tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with the same encoder and a narrower decoder."""
    vae = dict(TINY.vae) | {"block_out_channels": (8, 8, 16, 16)}
    vae["decoder_block_out_channels"] = (8, 8, 8, 24)
    return write_random(tmp_path_factory.mktemp("small") / "model", replace(TINY, vae=vae))


@pytest.fixture(scope="module")
def expected(folder):
    """The latents of the diffusers folder."""
    made = {precision: latents(load_model(folder, precision)) for precision in ("fp32", "bf16")}
    assert made["fp32"].std() > 0.1
    return made


def weights_of(loaded) -> dict[str, torch.Tensor]:
    return loaded.components.transformer.network.state_dict()


def is_near(made: torch.Tensor, right: torch.Tensor, tolerance: float) -> bool:
    return float((made - right).norm() / right.norm()) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("prefix", one_of("model.diffusion_model.", ""))
def test_one_file_in_bfl_names_gives_the_folders_latents(folder, expected, precision, prefix):
    """Fused projections are cut, halves swapped, prefixes taken off: not a bit is lost."""
    name = f"bfl{len(prefix)}-{precision}.safetensors"
    loaded = load_model(write_bf16(folder, folder / name, prefix), precision)

    right = load_file(folder / "transformer" / WEIGHTS)
    assert loaded.features[-1] == f"diffusers folder with {name}"
    for key, value in weights_of(loaded).items():
        assert torch.equal(value, right[key].to(value.dtype)), key
    # The last bit of a product hangs on where its weights happen to lie.
    assert is_near(latents(loaded), expected[precision], 1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("vae", one_of("bfl", "diffusers"))
def test_comfyuis_folder_gives_the_folders_latents(folder, expected, tmp_path, vae):
    """The models folder as it stands, architecture told from the shapes; both names of the VAE."""
    tensors = bfl_vae(folder) if vae == "bfl" else None
    loaded = load_model(to_comfy(folder, tmp_path / "models", tensors))

    assert loaded.features[-1] == "ComfyUI models folder"
    assert is_near(latents(loaded), expected["fp32"], 1e-5)
    right = load_file(folder / "vae" / WEIGHTS)
    assert loaded.components.vae.state_dict().keys() == right.keys()
    for key, value in loaded.components.vae.state_dict().items():
        assert torch.equal(value, right[key]), key


def test_a_float32_vae_is_cast(folder, tmp_path):
    """ComfyUI's VAE comes in float32 and is used at the arithmetic's precision."""
    models = to_comfy(folder, tmp_path / "models")
    components = build(models, dtype=torch.bfloat16, linears="bf16")

    assert components.vae.decoder.conv_in.weight.dtype is torch.bfloat16


def test_on_a_processor_the_vae_stays_in_float32(folder):
    """Most processors take 80 times as long for a convolution in bfloat16."""
    components = load_model(folder, "bf16").components

    assert components.vae.decoder.conv_in.weight.dtype is torch.float32
    assert components.transformer.network.proj_out.weight.dtype is torch.bfloat16
    assert decode(components, latents(load_model(folder, "bf16")), (4, 6)).dtype is torch.float32


@pytest.mark.parametrize("is_bfl", one_of(True, False))
def test_the_small_decoder_is_told_from_its_widths(small, tmp_path, is_bfl):
    """Same encoder, narrower decoder: the picture is that of the folder that says so in words."""
    tensors = bfl_vae(small) if is_bfl else None
    right, found = load_model(small), load_model(to_comfy(small, tmp_path / "models", tensors))
    latent = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        made = [decode(each.components, latent, (4, 6)) for each in (right, found)]

    assert found.components.vae.decoder.conv_in.weight.shape[0] == 24
    assert torch.allclose(*made, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_scale_is_the_same_layer(folder, tmp_path, spelling):
    """Names, notes, prefixes and shapes of scales differ; scale and rounded weight do not."""
    right = write_fp8(folder, tmp_path / "right.safetensors")
    made = spell_fp8(folder, tmp_path / "made.safetensors", spelling)
    with SafetensorsFile(right) as right_file, SafetensorsFile(made) as made_file:
        one, other = read_transformer(right_file, None), read_transformer(made_file, None)
        assert len(one.quantized) == 2 * 8 + 2 * 2
        assert one.quantized.keys() == other.quantized.keys()
        for name, layer in one.quantized.items():
            found = other.quantized[name]
            assert torch.equal(layer.weight().float(), found.weight().float())
            assert float(layer.weight_scale) == float(found.weight_scale)
            assert float(found.input_scale) == pytest.approx(0.05)
        assert one.config == other.config
        assert one.slots.keys() == other.slots.keys()
        for name, slot in one.slots.items():
            assert torch.equal(slot.read(), other.slots[name].read()), name


@pytest.mark.parametrize("spelling", ["rows", "rows as a column"])
def test_scales_by_rows_are_cut_with_their_rows(folder, tmp_path, spelling):
    """A scale for each row is applied to that row, in fused projections too."""
    made = spell_fp8(folder, tmp_path / "made.safetensors", spelling)
    right = load_file(folder / "transformer" / WEIGHTS)
    with SafetensorsFile(made) as file:
        for name, slot in read_transformer(file, None).slots.items():
            assert is_near(slot.read(), right[name], 0.04), name


def test_the_fp8_file_equals_folding_its_scales(folder, tmp_path):
    """In float32 the fp8 file is the bf16 one with each scale multiplied in, bit by bit."""
    folded = fold_scales(folder, tmp_path / "folded")
    loaded = load_model(write_fp8(folder, folder / "fp8.safetensors"))

    right = load_model(folded)
    for key, value in weights_of(loaded).items():
        assert torch.equal(value, weights_of(right)[key]), key
    assert is_near(latents(loaded), latents(right), 1e-5)


@pytest.mark.parametrize("spelling", one_of("published", "rows", "old"))
def test_fp8_layers_come_near_the_folded_scales(folder, expected, spelling):
    """Emulated fp8 products: near what folding gives, whatever the spelling."""
    path = spell_fp8(folder, folder / f"near {spelling}.safetensors", spelling)
    loaded = load_model(path, "fp8")

    blocks = loaded.components.transformer.network.transformer_blocks
    assert blocks[0].image_qkv.weight.dtype is torch.float8_e4m3fn
    assert is_near(latents(loaded), expected["fp32"], 0.1)


def test_an_uncalibrated_input_scale_is_looked_up_at_each_call(folder):
    """1.0 is a placeholder and nonsense is nonsense; such layers scale their input themselves."""
    for number, scale in enumerate((1.0, 0.0, -1.0, float("nan"), float("inf"), None)):
        path = write_fp8(folder, folder / f"scale {number}.safetensors", input_scale=scale)
        with SafetensorsFile(path) as file:
            layers = read_transformer(file, None).quantized
            assert all(layer.input_scale is None for layer in layers.values()), scale
    loaded = load_model(write_fp8(folder, folder / "calibrated.safetensors"), "fp8")
    layer = loaded.components.transformer.network.transformer_blocks[0].image_out
    assert isinstance(layer, Fp8Linear)
    assert float(layer.input_scale) == pytest.approx(0.05)


def test_a_layer_may_ask_for_full_precision(folder):
    """`full_precision_matrix_mult` in the header: one byte of weight, but no rounded input."""
    notes = {"full_precision_matrix_mult": True}
    path = write_fp8(folder, folder / "full precision.safetensors", notes=notes)
    blocks = load_model(path, "fp8").components.transformer.network.single_transformer_blocks

    assert isinstance(blocks[0].joined, WeightOnlyLinear)
    assert blocks[0].joined.weight.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("layout", one_of("ComfyUI", "one file", "whole folder"))
def test_parts_of_an_earlier_download_are_asked_for_only_where_they_lack(
    folder, tmp_path, monkeypatch, layout
) -> None:
    """Hashing them takes long where others may write to the cache."""
    asked = []

    @contextmanager
    def downloaded(*_):
        asked.append(layout)
        yield folder

    monkeypatch.setattr("app.engine.load._downloaded", downloaded)
    path = folder
    if layout == "one file":
        path = write_bf16(folder, tmp_path / "alone.safetensors")
    elif layout == "ComfyUI":
        path = to_comfy(folder, tmp_path / "models")

    load_model(path)
    assert bool(asked) == (layout == "one file")


def test_comfyuis_three_files_work_as_they_stand(folder, tmp_path):
    """Without a tokenizer in it, the package's is taken, whose ids the encoder must know."""
    models = to_comfy(folder, tmp_path / "models")
    shutil.rmtree(models / "tokenizer")
    assert sorted(path.name for path in models.iterdir()) == [
        "diffusion_models",
        "text_encoders",
        "vae",
    ]
    with pytest.raises(StartupError, match="vocabulary of 272, needed is at least 151669"):
        load_model(models)

    path = models / "text_encoders" / "qwen_3_4b.safetensors"
    tensors = load_file(path)
    name = "model.embed_tokens.weight"
    tensors[name] = torch.randn(151_936, tensors[name].shape[1]).to(tensors[name].dtype)
    save_file(tensors, path)
    loaded = load_model(models)
    tokens = loaded.components.tokenizer("a red circle")
    assert tokens.ids[:4] == [151_644, 872, 198, 64]
    assert latents(loaded).isfinite().all()


def test_a_folder_with_nothing_but_a_transformer_is_that_file(folder, tmp_path, monkeypatch):
    """As the repository of the fp8 file, whose other parts are those of the catalogue's entry."""
    monkeypatch.setattr("app.engine.load._downloaded", lambda *_: nullcontext(folder))
    write_fp8(folder, tmp_path / "flux-2-klein-4b-fp8.safetensors")

    assert load_model(tmp_path).features[-1].endswith("with flux-2-klein-4b-fp8.safetensors")
    assert read_notes(tmp_path).fp8_layers == 20


@pytest.mark.parametrize("layout", one_of("ComfyUI", "one file", "whole folder"))
def test_another_vae_is_used_instead_of_the_models(folder, small, tmp_path, layout):
    """Told by name, counted by its own bytes; the model's own is not even looked for."""
    vae = tmp_path / "full_encoder_small_decoder.safetensors"
    shutil.copy(small / "vae" / WEIGHTS, vae)
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    if layout == "ComfyUI":
        path = to_comfy(folder, tmp_path / "models")
    shutil.rmtree(path / "vae")
    assert read_notes(path, vae).fp8_layers == 0
    if layout == "one file":
        path = write_bf16(folder, path / "alone.safetensors")

    loaded = load_model(path, vae=str(vae))

    assert "VAE full_encoder_small_decoder.safetensors" in loaded.features
    assert loaded.components.vae.decoder.conv_in.weight.shape[0] == 24
    right = load_file(small / "vae" / WEIGHTS)
    for key, value in loaded.components.vae.state_dict().items():
        assert torch.equal(value, right[key]), key


def test_another_vaes_bytes_are_what_the_planner_counts(folder, small):
    """The narrow decoder's, not the model's."""
    precision = SimpleNamespace(
        dtype=torch.bfloat16, linears=FORMATS["fp8"], encoder_linears=FORMATS["int8w"]
    )
    found = {}
    for vae in (None, small / "vae" / WEIGHTS):
        checkpoint = open_checkpoint(folder, vae=vae)
        with checkpoint.files:
            found[vae] = count_weights(checkpoint, FLUX2_KLEIN_4B, precision)
    tensors = load_file(small / "vae" / WEIGHTS)
    assert found[vae].decoder == 2 * sum(
        value.numel() for name, value in tensors.items() if not name.startswith("encoder.")
    )
    assert found[vae].decoder != found[None].decoder
    assert found[vae].transformer == found[None].transformer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.safetensors", "KLEIN_VAE names .*missing.safetensors, which is no file"),
        ("vae.ckpt", "vae.ckpt is not read, since its format can run code"),
        ("other.safetensors", "other.safetensors is no VAE of FLUX.2"),
        ("narrow.safetensors", r"vae \(narrow.safetensors\) has 2 latent channels"),
        ("plain.safetensors", r"vae \(plain.safetensors\) has no batch-norm statistics"),
    ],
)
def test_another_vae_that_does_not_fit_is_refused_by_name(folder, tmp_path, name, words):
    """FLUX.1's has half the latents and no statistics."""
    tensors = load_file(folder / "vae" / WEIGHTS)
    if name.startswith("narrow"):
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :2].contiguous()
    if name.startswith("plain"):
        tensors = {key: value for key, value in tensors.items() if not key.startswith("bn.")}
    if name.startswith("other"):
        tensors = {"weight": torch.zeros(2)}
    if not name.startswith("missing"):
        save_file(tensors, tmp_path / name)

    with pytest.raises(StartupError, match=words):
        load_model(folder, vae=str(tmp_path / name))
