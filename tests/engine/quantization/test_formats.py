"""A weight format is one entry of the registry: everything else follows from it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.cli.warm_worker import parse_precisions
from app.domain import ImageSpec
from app.engine.checkpoint.detect import open_checkpoint
from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.config import EngineConfig
from app.engine.engine import KleinEngine
from app.engine.memory.budget import choose_plan
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.models.registry import find_model, find_spec
from app.engine.quantization.formats import FORMATS, Layers, WeightFormat, choices
from app.engine.quantization.probe import kernel_fault
from app.engine.quantization.select import GpuCapabilities, choose_precision
from app.engine.roofline import GPUS, GpuDatasheet, roofline
from app.errors import StartupError
from app.model_choice import read_settings
from tests.support.layout_files import latents, load_model

pytestmark = pytest.mark.torch

MODEL = "flux.2-klein-4b"
CPU = torch.device("cpu")


class AffineLinear(nn.Module):
    """Weights of 256 levels with a scale and a least value for each row: no layer of the app's."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scale, self.least = (
            nn.Parameter(each, requires_grad=False) for each in (weight, scale, least)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() * self.scale[:, None] + self.least[:, None]
        return (x.float() @ weight.t()).to(x.dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    least, most = weight.float().aminmax(dim=1)
    scale = (most - least).clamp(min=1e-12) / 255
    levels = (weight.float() - least[:, None]) / scale[:, None]
    return levels.round().to(torch.uint8), scale, least


DUMMY = WeightFormat(
    name="dummy",
    layers=lambda: Layers(AffineLinear, quantize, cached=("weight", "scale", "least")),
    weight_bytes=0.5,
    encoder="dummy",
    rate="int8",
    reason="sm_{0}{1} has the dummy's kernel",
)


@pytest.fixture
def dummy(monkeypatch):
    """The one entry that a new format is."""
    monkeypatch.setitem(FORMATS, DUMMY.name, DUMMY)
    return DUMMY


def test_a_new_format_draws_a_picture(dummy, tiny_klein, tmp_path, monkeypatch):
    """Asked for by its name as any other, from the load to the pixels."""
    monkeypatch.setattr("app.engine.engine.warm_up", lambda *_, **__: 0.0)
    engine = KleinEngine(EngineConfig(MODEL, str(tiny_klein), str(tmp_path), None, dummy.name))
    info = engine.load(lambda _: None)
    made = engine.generate(ImageSpec("a circle", 64, 64, 1, 1.0, 7), lambda _: None, lambda: False)
    engine.close()

    assert (info.precision, len(made.image.pixels)) == ("dummy", 64 * 64 * 3)


def test_a_new_format_is_kept_in_the_cache_and_recalled(dummy, tiny_klein, tmp_path, monkeypatch):
    """All its tensors, under its name; the next start reads no large weight of the sources."""
    first = load_model(tiny_klein, dummy.name, tmp_path)
    (kept,) = (tmp_path / "converted").glob("transformer-dummy-*.safetensors")
    assert {name.rpartition(".")[2] for name in load_file(kept)} == {
        "weight",
        "scale",
        "least",
    }
    seen = []
    plain = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, *what: seen.append(what[0]) or plain(self, *what)
    )
    again = load_model(tiny_klein, dummy.name, tmp_path)

    sources = [each.name for each in seen if each.file.path.parent != kept.parent]
    assert not any("_proj." in name or "attn.to_" in name for name in sources)
    assert torch.equal(latents(first), latents(again))
    assert float((latents(first) - latents(load_model(tiny_klein))).norm()) > 0


def test_a_new_format_is_planned_with_its_bytes(dummy, tiny_klein, monkeypatch):
    """Half a byte for each weight of its matrices instead of int8's one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20_000_000_000, 24_000_000_000))
    facts = GpuCapabilities((8, 6), frozenset())
    config = EngineConfig(MODEL, str(tiny_klein), "", 0)
    checkpoint = open_checkpoint(tiny_klein)
    with checkpoint.files:
        slots = {**checkpoint.transformer.slots, **checkpoint.encoder.slots}
        large = [
            slot.shape[0] * slot.shape[1]
            for name, slot in slots.items()
            if len(slot.shape) == 2
            and ("blocks." in name or (".layers." in name and "layers.27." not in name))
        ]
        peaks = [
            choose_plan(
                config,
                find_spec(MODEL),
                FLUX2_KLEIN_4B,
                checkpoint,
                torch.device("cuda", 0),
                choose_precision(name, facts, is_small=False),
                has_kernels=True,
            ).peak_bytes
            for name in ("int8", dummy.name)
        ]

    assert peaks[0] - peaks[1] == pytest.approx(sum(large) / 2, abs=1)


def test_a_new_format_is_offered_and_chosen(dummy):
    """In the error that lists the choices, on the command line, by `auto`, and with its floor."""
    with pytest.raises(
        StartupError, match=r"'auto', 'fp8', 'int8', 'bf16', 'fp32', 'dummy' or 'per-card'\."
    ):
        read_settings({"KLEIN_PRECISION": "fp9"})
    chosen = choose_precision("auto", GpuCapabilities((9, 0), frozenset(["dummy"])), is_small=False)

    assert read_settings({"KLEIN_PRECISION": "dummy"}).precision == "dummy"
    assert parse_precisions("dummy,fp8") == ("dummy", "fp8")
    assert (chosen.name, chosen.reason) == ("dummy", "sm_90 has the dummy's kernel")
    floors = {roofline(FLUX2_KLEIN_4B, GPUS[0], name, 512, 512, 4) for name in ("int8", "dummy")}
    assert len(floors) == 1


def test_a_wrong_precision_is_one_sentence_that_lists_the_choices():
    """As for every other setting; the formats of single layers are not among them."""
    with pytest.raises(StartupError) as refused:
        read_settings({"KLEIN_PRECISION": "fp8w"})

    assert refused.value.message == (
        "KLEIN_PRECISION has a value that does not fit: Input should be 'auto', 'fp8', 'int8', "
        "'bf16', 'fp32' or 'per-card'. Correct it and start again."
    )


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_entry_refers_to_is_there(name):
    """Its key, other formats, the models' files, and the datasheet's fields."""
    entry = FORMATS[name]

    assert entry.name == name
    assert {entry.encoder, entry.substitute or name} <= FORMATS.keys()
    assert entry.file in find_model(MODEL).transformers
    assert entry.rate in {None, *(each.name for each in fields(GpuDatasheet))}
    assert entry.is_choice == (name in choices())


@pytest.mark.parametrize("name", FORMATS)
def test_an_entry_builds_a_layer_of_any_size_that_agrees_with_bf16(name):
    """What a probe or a race of formats needs of it; here by its emulation."""
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    layer = FORMATS[name].build(weight, torch.bfloat16)

    assert layer(torch.randn(3, 80, dtype=torch.bfloat16)).shape == (3, 48)
    assert all(hasattr(layer, word) for word in FORMATS[name].layers().cached)
    assert kernel_fault(FORMATS[name], CPU, FLUX2_KLEIN_4B) == ""


def test_an_entry_says_why_it_does_not_run():
    """What is not installed, or whose product is wrong."""
    lost = replace(DUMMY, missing=lambda: "its library is not installed")
    wrong = replace(
        DUMMY, kernel="a library", layers=lambda: Layers(AffineLinear, lambda w: quantize(-w))
    )

    assert lost.fault(CPU, FLUX2_KLEIN_4B) == "its library is not installed"
    assert wrong.fault(CPU, FLUX2_KLEIN_4B) == "a library's product does not agree with bf16 here"


def test_the_names_come_without_torch():
    """The HTTP process and `klein --help` list them."""
    code = (
        "import sys, app.model_choice, app.cli.download, app.engine.quantization.formats as f;"
        "f.choices(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
