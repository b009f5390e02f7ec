"""What is missing is told with its cost on the card and the command that mends it."""

from __future__ import annotations

import logging
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.engine import advice
from app.engine.models.registry import find_model
from app.engine.quantization.formats import FORMATS
from app.engine.roofline import find_gpu
from app.engine.runtime import toolchain
from app.runtime import build_runtime
from app.settings import Settings
from tests.support.fakes import INFO

ROOT = Path(__file__).resolve().parents[2]
KLEIN = find_model("flux.2-klein-4b")
LACKING = {"int8": "comfy-kitchen is not installed"}
INSTALL = "-m pip install --force-reinstall comfy-kitchen==0.2.40"
PIP = f"To mend it: .venv/bin/python {INSTALL}"


@pytest.fixture(autouse=True)
def _in_a_virtual_environment(monkeypatch, tmp_path):
    """The service was started in the folder of its environment, as `make serve` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))


def test_no_path_of_the_machine_is_told(monkeypatch, tmp_path):
    """`/health` shows the sentence: elsewhere the command names no folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    told_here = told("rtx-3060", "fp8w")[0]

    assert told_here.endswith(f"pip {INSTALL.partition(' pip ')[2]} (in klein's environment)")
    monkeypatch.chdir("/")
    assert told("rtx-3060", "fp8w")[0] == told_here


def told(key: str, taken: str, asked: str = "auto", lacking=LACKING) -> list[str]:
    """What is said on the card *key* of a datasheet, or of a capability such as 8.6 without one."""
    spec = find_gpu(key)
    capability = spec.capability if spec else tuple(int(each) for each in key.split("."))
    card = advice.Card(capability, spec)
    return [str(each) for each in advice.on_formats(asked, lacking, FORMATS[taken], card, KLEIN)]


@pytest.mark.parametrize(
    ("key", "taken", "cost"),
    [
        ("rtx-3060", "fp8w", "takes this card at least 5.99 s as it is, and 2.66 s in int8"),
        ("rtx-4070", "fp8", "takes this card at least 1.65 s as it is, and 1.16 s in int8"),
        ("8.6", "fp8w", "up to 2.2 times as long (computed from the datasheet of a card"),
        ("8.0", "fp8w", "what that costs on this card is not known"),
    ],
)
def test_a_missing_library_costs_what_the_datasheet_says(key, taken, cost) -> None:
    """By the floors of both precisions; of a card without one by its kind, or not at all."""
    (line,) = told(key, taken)

    assert line.startswith("int8 cannot be chosen, since comfy-kitchen is not installed")
    assert cost in line
    assert line.endswith(PIP)


def test_nothing_is_said_where_nothing_is_lost() -> None:
    """Int8 is no faster on an H200, was not asked for, or is there."""
    assert told("h200", "fp8") == []
    assert told("rtx-3060", "bf16", asked="bf16") == []
    assert told("rtx-3060", "int8", lacking={}) == []


def test_a_format_that_was_asked_for_without_its_library_is_told() -> None:
    """It runs, and nobody has measured how slowly."""
    (line,) = told("rtx-3060", "int8", asked="int8")

    assert line.startswith("int8 runs by PyTorch's own kernels, since comfy-kitchen is not")
    assert "was not measured" in line
    assert line.endswith(PIP)


def test_the_command_installs_what_the_package_pins() -> None:
    """The version in the message is that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert FORMATS["int8"].package in {each.split(";")[0] for each in project["dependencies"]}


@pytest.mark.parametrize(
    ("there", "missing", "command"),
    [
        ("apt-get", {"a C compiler"}, "sudo apt-get install gcc python3-dev"),
        ("dnf", {"Python's headers"}, "sudo dnf install gcc python3-devel"),
        ("", {"a C compiler"}, "install gcc and Python's headers by this system's own means"),
        ("apt-get", {"Triton"}, "pip install --force-reinstall -r requirements.lock"),
    ],
)
def test_a_compiler_is_installed_by_the_systems_own_means(
    monkeypatch, there, missing, command
) -> None:
    """One command, for the installer that is there."""
    monkeypatch.setattr(shutil, "which", lambda name: name if name == there else None)

    assert toolchain.install_command(missing) == command


async def test_a_start_says_what_is_missing(caplog) -> None:
    """Once, as a warning, before the lines of what is served."""
    runtime = build_runtime(Settings(model="shapes", device="cpu"))
    with caplog.at_level(logging.INFO):
        runtime.workers.workers[0].on_worker_ready(
            replace(INFO, advice=("100 % of it is missing.",)), 1.0
        )

    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
        "100 % of it is missing."
    ]


@pytest.mark.torch
class TestWhatTheEngineSays:
    """Of a card that is not there, made up."""

    @pytest.fixture
    def load(self):
        from app.engine import load

        return load

    def test_a_model_without_kernels_names_cost_and_command(self, load) -> None:
        """Where the compiler is missing; the processor, which needs none, says nothing."""
        kernels = replace(load.EXACT, reason="a C compiler missing", remedy="install it")
        (line,) = load._kernels_advice(kernels)

        assert line.startswith("Our own kernels do not run (a C compiler missing), so each picture")
        assert "about 1.6 times as long" in line
        assert line.endswith("To mend it: install it")
        assert list(load._kernels_advice(load.EXACT)) == []

    def test_a_card_is_known_by_what_torch_says_of_it(self, load, monkeypatch) -> None:
        """Its name, and a memory that is a little less than NVML's."""
        from app.engine.config import EngineConfig
        from app.engine.quantization import int8_kernel
        from app.engine.quantization.select import GpuCapabilities, choose_precision

        monkeypatch.setattr(int8_kernel, "why_missing", lambda: LACKING["int8"])
        monkeypatch.setattr(
            load.torch.cuda,
            "get_device_properties",
            lambda _: SimpleNamespace(total_memory=12_622_168_064),
        )
        monkeypatch.setattr(load.torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
        facts = GpuCapabilities((8, 6), frozenset(), {"fp8": "no such units", **LACKING})
        config = EngineConfig(model=KLEIN.spec.id, path=None, cache_dir="/nowhere", device=0)
        precision = choose_precision("auto", facts, is_small=False)

        assert load._format_advice(config, precision, facts) == tuple(told("rtx-3060", "fp8w"))


@pytest.mark.torch
class TestTheLibrary:
    """comfy-kitchen is imported where a card may run it, and nowhere else."""

    @pytest.fixture
    def kernel(self):
        from app.engine.quantization import int8_kernel

        int8_kernel._load.cache_clear()
        yield int8_kernel
        int8_kernel._load.cache_clear()

    def test_one_that_does_not_load_is_told_from_one_that_is_not_there(
        self, kernel, monkeypatch
    ) -> None:
        """The start goes on without it."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert kernel.why_missing() == "comfy-kitchen is not installed"
        kernel._load.cache_clear()
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

        def fail(name: str) -> None:
            raise OSError("libcudart.so.13: cannot open shared object file")

        monkeypatch.setattr("importlib.import_module", fail)
        assert kernel.why_missing() == "comfy-kitchen is installed and does not load (OSError)"
        assert kernel.library_product() is None

    def test_a_processor_does_without(self, kernel, monkeypatch) -> None:
        """Neither the probe nor a layer imports it there: it takes a second and 200 MB of disk."""
        import torch

        from app.engine.quantization.probe import probe_gpu

        monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail("looked for"))
        assert probe_gpu(torch.device("cpu")) is None
        FORMATS["int8"].build(torch.ones(16, 64), torch.float32)
