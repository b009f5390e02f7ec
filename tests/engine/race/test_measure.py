"""What is timed and what errors are found; the times themselves are made up here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from app.engine.models.registry import find_model
from app.engine.modules.attention import KERNELS, AttentionKernel, plain_attention
from app.engine.quantization.formats import FORMATS
from app.engine.quantization.select import choose_precision
from app.engine.race import measure
from app.engine.race.results import Lap, choose
from app.errors import StartupError
from tests.engine.race.test_results import H100, RTX_3060, RTX_4070, without_library

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
KLEIN = find_model("flux.2-klein-4b").architecture
SHAPES = replace(find_model("shapes").architecture, reference_pixels=256**2)


def test_the_matmuls_are_the_step():
    """28.27 TFLOP in klein's linear layers at 1024x1024."""
    flops = sum(2 * KLEIN.step_tokens * x.inputs * x.outputs * x.count for x in KLEIN.matmuls)

    assert flops == pytest.approx(28.27e12, rel=1e-3)
    assert KLEIN.matmuls[0].outputs == KLEIN.widest_matmul[2]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_each_piece_has_room(has_kernels):
    """Weights, input with its copies, and output below 256 MB, in equal parts of the whole."""
    for matmul in KLEIN.matmuls:
        rows, outputs = measure.piece(matmul, KLEIN.step_tokens, has_kernels=has_kernels)
        copies = 3 if has_kernels else 17
        used = 2 * matmul.inputs * outputs + rows * (matmul.inputs * copies + 2 * outputs)

        assert used < 210_000_000
        assert KLEIN.step_tokens % rows == matmul.outputs % outputs == 0


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.04), ("int8", 0.02), ("bf16", 0.003)])
def test_the_emulated_formats_keep_their_bounds(name, bound):
    """With heavy-tailed weights and inputs."""
    assert 0 < measure.linear_error(FORMATS[name], CPU, 768) < bound <= FORMATS[name].max_error


def test_attention_is_held_against_float32():
    """torch's own is right, and one that rounds its values to one byte is seen."""
    rough = AttentionKernel("rough", lambda q, k, v: plain_attention(q, k, 2 * v), lambda _: "")

    assert measure.attention_error(KERNELS["torch"], CPU, 256, 64) < 0.005
    assert measure.attention_error(rough, CPU, 256, 64) == pytest.approx(1.0, abs=0.01)
    assert KERNELS["int8"].max_error == 0.03


@pytest.mark.parametrize("name", ["fp8", "int8", "bf16"])
def test_the_layer_that_is_timed_is_one_of_its_format(name):
    """As large as asked, with weights of one byte where the format has them."""
    plain = FORMATS[name].build(torch.randn(128, 64), torch.bfloat16)
    layer = measure.repeated_layer(FORMATS[name], 64, 128, CPU)
    fused = FORMATS[name].layers().fused
    x = torch.randn(32, 64, dtype=torch.bfloat16)

    assert type(layer) is type(plain)
    assert (layer.weight.shape, layer.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    assert (fused(layer) if fused else layer)(x).shape == (32, 128)


@pytest.fixture
def counted(monkeypatch):
    """A race on no card, in which each call takes a millisecond; how often one was timed."""
    calls = []
    monkeypatch.setattr(measure, "warm", lambda device: None)
    monkeypatch.setattr(measure, "gpu_seconds", lambda run, spreads: calls.append(run) or 1e-3)
    monkeypatch.setattr(measure, "linear_error", lambda *_: 0.01)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    return calls


def test_a_step_is_as_often_a_matmul_as_the_blocks_run_it(counted, monkeypatch):
    """Two double and six single blocks: 2 * 4 and 6 * 2 matmuls, and 8 times attention."""
    monkeypatch.setattr(measure, "_busy", lambda device: "")
    made = measure.hold(CPU, SHAPES, has_kernels=True)
    linears, attention = ({lap.name: lap for lap in p} for p in (made.linears, made.attention))

    assert linears["fp8"].seconds == linears["bf16"].seconds == pytest.approx(20e-3)
    assert attention["torch"].seconds == pytest.approx(8e-3)
    assert "Hopper" in attention["cudnn"].fault
    assert [lap.name for lap in made.attention] == ["fp8", "int8", "cudnn", "torch"]
    assert not made.disturbed


@pytest.mark.parametrize(("load", "said"), [(None, ""), (0.1, ""), (0.87, "others used 87% of it")])
def test_others_on_the_card_are_noticed(monkeypatch, load, said):
    """By what NVML says before anything of ours runs."""
    gpu = SimpleNamespace(read=lambda: SimpleNamespace(utilization_ratio=load))
    monkeypatch.setattr(measure, "_gpu", lambda device: gpu)

    assert measure._busy(CPU) == said


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H100 80GB HBM3", "GPU-1b2c"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "MIG-1b2c")],
)
def test_nvml_is_asked_of_the_card_that_torch_has(monkeypatch, name, key):
    """By UUID: torch's first card need not be NVML's."""
    properties = SimpleNamespace(name=name, uuid="1b2c")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(measure, "Gpu", lambda key: key)

    assert measure._gpu(torch.device("cuda", 0)) == key


class Timeline:
    """A GPU that works off what a host queues, at given seconds a call for each."""

    def __init__(self, monkeypatch, *, on_gpu: float, on_host: float) -> None:
        self.now = self.free_at = 0.0
        self.spins: list[float] = []
        self._on_gpu, self._on_host = on_gpu, on_host
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(measure.torch_private, "spin", self._spin)

    def run(self) -> None:
        self.now += self._on_host
        self._queue(self._on_gpu)

    def _spin(self, cycles: int) -> None:
        self.spins.append(cycles / 2e9)
        self._queue(self.spins[-1])

    def _queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + seconds


class Event:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._at = timeline, 0.0

    def record(self) -> None:
        self._at = max(self._timeline.free_at, self._timeline.now)

    def query(self) -> bool:
        return self._at <= self._timeline.now

    def synchronize(self) -> None:
        self._timeline.now = max(self._at, self._timeline.now)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


@pytest.mark.parametrize("on_host", [1e-5, 3e-4, 2e-3, 1e-2])
def test_a_slow_host_is_not_timed(monkeypatch, on_host):
    """A layer that many launches make is not slower for it: the GPU waits until all are queued."""
    timeline = Timeline(monkeypatch, on_gpu=2e-4, on_host=on_host)
    spreads: list[float] = []

    assert measure.gpu_seconds(timeline.run, spreads) == pytest.approx(2e-4)
    assert spreads == [pytest.approx(0, abs=1e-6)]
    assert max(timeline.spins) <= max(3e-3, 2 * 3 * on_host)


def test_a_host_that_no_wait_suffices_for_ends(monkeypatch):
    """A second a call: the times count both then, and timing ends."""
    timeline = Timeline(monkeypatch, on_gpu=2e-4, on_host=1.0)

    assert measure.gpu_seconds(timeline.run, []) > 0.5
    assert max(timeline.spins) < 0.2


def test_equal_runs_that_differ_are_noticed(counted, monkeypatch):
    """What NVML does not see, on a card that is shared by other means."""
    monkeypatch.setattr(measure, "_busy", lambda device: "")
    monkeypatch.setattr(measure, "gpu_seconds", lambda run, spreads: spreads.append(0.4) or 1e-3)

    assert measure.hold(CPU, SHAPES, has_kernels=True).disturbed == "equal runs differed by 40%"


@pytest.mark.parametrize(
    ("results", "runs", "fastest"),
    [
        (RTX_3060, {"int8"}, "int8"),
        (RTX_4070, {"fp8", "int8"}, "int8"),
        (H100, {"fp8"}, "fp8"),
        (without_library(RTX_3060), set(), ""),
    ],
)
def test_the_choice_of_the_precision_follows(results, runs, fastest):
    """What is admitted, what was fastest, and why others were left out."""
    facts = measure.capabilities(results, choose(results))

    assert (facts.runs, facts.fastest) == (runs, fastest)
    assert set(facts.faults) == {"fp8", "int8"} - runs


@pytest.mark.parametrize("error", [0.05, float("nan")])
def test_a_wrong_product_is_refused_by_name_too(error):
    """It runs, but its error is beyond the bound, or no number."""
    laps = tuple(replace(lap, error=error) for lap in RTX_3060.linears)
    results = replace(RTX_3060, linears=laps)
    facts = measure.capabilities(results, choose(results, "int8"))

    with pytest.raises(StartupError, match="asks for int8, which cannot be used: its error"):
        choose_precision("int8", facts, is_small=False)


def test_a_library_that_is_mended_races_anew(monkeypatch, tmp_path):
    """Its version may be the same; of a library that ran, or runs wrongly, nothing is asked."""
    broken = "comfy-kitchen is installed and does not load (OSError)"
    kept = {
        "broken": replace(RTX_3060, linears=(Lap("int8", fault=broken),)),
        "failing": replace(
            RTX_3060, linears=(Lap("int8", fault=measure._failing(FORMATS["int8"])),)
        ),
        "ran": RTX_3060,
    }
    found = {}
    for name, results in kept.items():
        monkeypatch.setattr(measure, "_key", lambda *_, **__: {"card": "c"})
        monkeypatch.setattr(measure, "recall", lambda *_, results=results: results)
        for missing in (broken, ""):
            entry = replace(FORMATS["int8"], missing=lambda missing=missing: missing)
            monkeypatch.setitem(FORMATS, "int8", entry)
            known = measure.known(CPU, SHAPES, tmp_path, has_kernels=True)
            found[name, missing] = known is results

    assert [name for name, is_kept in found.items() if not is_kept] == [("broken", "")]
