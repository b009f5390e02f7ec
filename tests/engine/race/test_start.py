"""How a start goes by the race: which weights, which file, which attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.engine import load as loading
from app.engine.config import EngineConfig
from app.engine.hub.download import choose_file
from app.engine.models.registry import find_model
from app.engine.modules.attention import KERNELS
from app.engine.quantization.select import GpuCapabilities, choose_precision
from app.errors import StartupError
from tests.engine.race.test_results import H100, RTX_3060, RTX_4070
from tests.support.layout_files import load_model
from tests.support.single_files import write_fp8

pytestmark = pytest.mark.torch

CARD = torch.device("cuda", 0)
KLEIN = find_model("flux.2-klein-4b")


def judge(monkeypatch, results, gone=(), **more: str):
    """What a start takes where the race's *results* are these; a race that is not held fails."""
    monkeypatch.setattr(loading, "race", lambda *_, **__: results)
    for name, kernel in KERNELS.items():
        fault = (lambda _: "it has gone") if name in gone else (lambda _: "")
        monkeypatch.setitem(KERNELS, name, replace(kernel, fault=fault))
    monkeypatch.setattr(
        loading, "choose_attention", lambda *_: KERNELS[more.get("attention", "torch")]
    )
    config = EngineConfig(KLEIN.spec.id, None, "/x", 0, **more)
    facts, kernel, raced = loading._judge(
        config, CARD, KLEIN.architecture, is_small=False, has_kernels=True
    )
    return choose_precision(config.precision, facts, is_small=False), kernel, raced


@pytest.mark.parametrize(
    ("results", "asked", "linears", "file", "kernel"),
    [
        (RTX_3060, "auto", "int8", "bf16", "int8"),
        (RTX_4070, "auto", "int8", "bf16", "int8"),
        (H100, "auto", "fp8", "fp8", "cudnn"),
        (RTX_4070, "fp8", "fp8", "fp8", "int8"),
    ],
)
def test_the_race_says_which_weights_and_which_file(
    monkeypatch, results, asked, linears, file, kernel
):
    """Before anything is downloaded; by hand only the attention is left to it."""
    precision, taken, raced = judge(monkeypatch, results, precision=asked)

    assert (precision.linears.name, precision.linears.file) == (linears, file)
    assert (taken.name, raced) == (KERNELS[kernel].name, results)
    assert ("ms a step" in precision.reason) == (asked == "auto")


def test_an_attention_by_hand_is_taken(monkeypatch):
    """Where it runs; torch's does everywhere."""
    assert judge(monkeypatch, RTX_4070, attention="torch")[1] is KERNELS["torch"]


def test_a_kernel_that_has_gone_since_the_race_is_not_taken(monkeypatch):
    """The race was kept, and the library does not load any more: a start must not end there."""
    assert judge(monkeypatch, RTX_4070, gone=["int8"])[1] is KERNELS["torch"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("sage", "Input should be 'auto', 'torch', 'cudnn', 'int8'"),
        ("cudnn", "KLEIN_ATTENTION asks for cudnn, which cannot be used: "),
        ("int8", "KLEIN_ATTENTION asks for int8, which cannot be used: "),
    ],
)
def test_an_attention_that_is_unknown_or_does_not_run_is_refused(tiny_klein, asked, said):
    """With the reason, in one sentence."""
    with pytest.raises(StartupError) as refused:
        load_model(tiny_klein, "fp8", attention=asked)

    assert said in refused.value.message


def test_a_precision_whose_kernel_does_not_run_is_refused():
    """A library that is only missing is no such case: PyTorch multiplies int8 too."""
    facts = GpuCapabilities((8, 6), frozenset(), broken={"int8": "its product does not run here"})
    with pytest.raises(StartupError, match=r"asks for int8, .*: its product does not run here"):
        choose_precision("int8", facts, is_small=False)


def test_no_race_on_the_processor_for_small_models_or_exact_ones(tiny_klein, monkeypatch):
    """Nothing is to be chosen there."""

    def never(*_, **__):
        raise AssertionError("a race was held")

    monkeypatch.setattr(loading, "race", never)
    monkeypatch.setattr(loading, "probe_gpu", lambda *_: None)
    monkeypatch.setattr(loading, "choose_attention", lambda *_: KERNELS["torch"])
    for device, precision, is_small in (
        (torch.device("cpu"), "auto", False),
        (CARD, "auto", True),
        (CARD, "bf16", False),
    ):
        config = EngineConfig(KLEIN.spec.id, None, "/x", 0, precision)
        _, _, raced = loading._judge(
            config, device, KLEIN.architecture, is_small=is_small, has_kernels=True
        )
        assert raced is None


@pytest.mark.parametrize(
    ("there", "instead", "expected"),
    [
        ((), "fp8", "bf16"),
        (("fp8",), "fp8", "fp8"),
        (("fp8",), "", "bf16"),
        (("bf16", "fp8"), "fp8", "bf16"),
        (("bf16",), "fp8", "bf16"),
    ],
)
def test_a_file_that_is_there_spares_a_download(monkeypatch, tmp_path, there, instead, expected):
    """int8 is made from bf16, or from the fp8 file where only that is there."""
    monkeypatch.setattr(
        "app.engine.hub.download.missing_bytes", lambda entry, cache, kind: kind not in there
    )

    assert choose_file(KLEIN, tmp_path, "bf16", instead) == expected


def test_int8_from_an_fp8_file_says_what_that_costs(tiny_klein, tmp_path):
    """Both errors together; from bf16 there is nothing to say."""
    write_fp8(tiny_klein, tmp_path / "flux-2-klein-4b-fp8.safetensors")
    parts = ("model_index.json", "text_encoder", "tokenizer", "vae", "scheduler")
    for part in (*parts, "transformer/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(tiny_klein / part)

    assert "about 2.9 % together" in load_model(tmp_path, "int8").precision.reason
    assert "together" not in load_model(tiny_klein, "int8", tmp_path).precision.reason
