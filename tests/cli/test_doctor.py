"""`klein doctor`: every machine can be judged on this one, since facts and judgement are apart."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.cli.console import add_options
from app.cli.doctor import command
from app.cli.doctor.checks import PINNED_CUDA, diagnose
from app.cli.doctor.facts import CacheFound, CardFound, Facts, HostFound, TorchFound
from app.engine.models.registry import find_spec
from app.engine.runtime.toolchain import CompilerFound
from app.model_choice import Choice
from app.settings import Settings
from app.telemetry.cards import Cards
from app.telemetry.gpu import Gpu, GpuFacts, Holder
from app.telemetry.preflight import check_gpu, minimum_driver
from tests.engine.race.test_results import RTX_3060
from tests.support.fake_nvml import FakeCard, FakeNvml

ROOT = Path(__file__).resolve().parents[2]
GB = 1_000_000_000
TORCH = TorchFound("2.13.0+cu130", "13.0", sees_gpu=True, runs=("int8",))


class TalkingNvml(FakeNvml):
    """An RTX 3060 that also tells who is on it, as far as that can be told."""

    def __init__(self, *cards: FakeCard, used_bytes: int = 2 * GB) -> None:
        super().__init__(*cards, used_bytes=used_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=1_900_000_000)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: int) -> list[SimpleNamespace]:
        raise self.NVMLError("Not Supported")


class MissingNvml:
    """A machine without a driver."""

    class NVMLError(Exception):
        """What NVML raises."""

    def nvmlInit(self) -> None:
        raise self.NVMLError("NVML Shared Library Not Found")


def ask(capsys, *words: str, nvml: object = None, torch: TorchFound = TORCH, **settings: object):
    """Run the command; the exit code and what it printed."""
    parser = argparse.ArgumentParser()
    add_options(parser, command.OPTIONS)
    code = command.run(
        parser.parse_args(words),
        Settings(**settings),
        cards=Cards(load_nvml=lambda: nvml or TalkingNvml(), environ={}),
        ask_torch=lambda devices: [torch] * max(1, len(devices)),
    )
    return code, capsys.readouterr().out


@pytest.mark.torch
def test_a_card_that_does_is_told_from_end_to_end(capsys, tmp_path) -> None:
    """Card, driver, torch, memory and who holds it, precision and plan with reasons, peak, floor,
    compiling, cache, host; and the exit code is 0."""
    code, said = ask(capsys, cache_dir=tmp_path)

    assert code == 0
    assert "NVIDIA GeForce RTX 3060, compute capability 8.6" in said
    assert "580.65.06, needed is 580 or newer" in said
    assert "2.13.0+cu130, built for CUDA 13.0" in said
    assert f"({os.getpid()}, 1.9 GB)" in said
    assert "flux.2-klein-4b: NVIDIA GeForce RTX 3060 can hold it" in said
    assert "int8: the card multiplies in int8" in said
    assert "resident" in said
    assert "expected at 1024x1024" in said
    assert "2.66 s for 1024x1024" in said
    assert "0.0 GB of 16.0 GB there, 16.0 GB missing" in " ".join(said.split())
    assert said.rstrip().endswith("It can serve.")


@pytest.mark.torch
def test_scripts_get_one_document(capsys, tmp_path) -> None:
    """The verdict, each problem with its remedy, and the facts as they were found."""
    code, said = ask(capsys, "--json", cache_dir=tmp_path)

    document = json.loads(said)
    assert code == 0
    assert document["can_serve"] is True
    assert document["card"]["capability"] == [8, 6]
    assert document["card"]["holders"][0]["pid"] == os.getpid()
    assert document["forecast"]["precision"] == "int8"
    assert document["forecast"]["plan"]["name"] == "resident"
    assert document["cache"]["missing_bytes"] > 15 * GB
    assert [problem["remedy"] for problem in document["problems"] if "download" in str(problem)]


@pytest.mark.torch
@pytest.mark.parametrize("words", [[], ["--card", "rtx-3060"]])
def test_a_plan_that_was_asked_for_is_the_one_that_is_told(capsys, tmp_path, words) -> None:
    """Not the one that `auto` would choose; as a start does, it is taken even where it is slow."""
    code, said = ask(capsys, "--json", *words, cache_dir=tmp_path, plan="streamed tiled")

    document = json.loads(said)
    assert code == 0
    assert document["forecast"]["plan"]["name"] == "streamed tiled"
    assert "as asked for" in document["forecast"]["plan"]["reasons"][-1]
    assert not [each for each in document["problems"] if "necessary" in each["what"]]


@pytest.mark.torch
@pytest.mark.parametrize("words", [[], ["--card", "rtx-3060-ti"]])
def test_a_plan_that_was_asked_for_and_has_no_room_must_be_mended(capsys, tmp_path, words) -> None:
    """The setting that asks for it is named."""
    nvml = TalkingNvml(used_bytes=7 * GB)
    code, said = ask(capsys, *words, nvml=nvml, cache_dir=tmp_path, plan="resident")

    assert code == 1
    assert "KLEIN_PLAN asks for resident" in said
    assert "KLEIN_PLAN=auto" in said


@pytest.mark.torch
def test_a_missing_library_is_told_with_its_cost_on_this_card(capsys, tmp_path) -> None:
    """In seconds by the datasheet, and with the command that installs it."""
    torch = replace(TORCH, runs=(), lacking={"int8": "comfy-kitchen is not installed"})
    code, said = ask(capsys, torch=torch, cache_dir=tmp_path)
    said = " ".join(said.split())

    assert code == 0
    assert "int8 cannot be chosen, since comfy-kitchen is not installed: 1024x1024 takes" in said
    assert "at least 5.99 s as it is, and 2.66 s in int8 (computed" in said
    assert "-m pip install --force-reinstall comfy-kitchen==" in said


@pytest.mark.torch
def test_a_cache_that_others_may_write_to_is_told(capsys, tmp_path) -> None:
    """With what it costs, and the command that ends it."""
    tmp_path.chmod(0o777)
    code, said = ask(capsys, cache_dir=tmp_path)

    assert code == 0
    assert f"others may write to {tmp_path}" in " ".join(said.split())
    assert f"chmod -R go-w {tmp_path}" in " ".join(said.split())


def test_a_machine_without_a_driver_is_told_what_to_install(capsys) -> None:
    """The exit code is 1, and there is a way out that needs no card."""
    torch = TorchFound("2.13.0", "13.0", sees_gpu=False)
    code, said = ask(capsys, nvml=MissingNvml(), torch=torch, model="flux.2-klein-4b")

    assert code == 1
    assert "nvml shared library not found" in said
    assert "driver 580 or newer" in said
    assert "KLEIN_DEVICE=cpu" in said
    assert said.rstrip().endswith("1 thing must be fixed before it can serve.")


def test_without_a_card_the_demo_is_what_auto_means(capsys) -> None:
    """It can be served, and the way to klein is told; a card asked for by number is missed."""
    torch = TorchFound("2.13.0", "13.0", sees_gpu=False)
    code, said = ask(capsys, nvml=MissingNvml(), torch=torch)

    assert code == 0
    assert "The demo model is served by the processor" in " ".join(said.split())
    assert "driver 580 or newer" in said
    assert ask(capsys, nvml=MissingNvml(), torch=torch, device=0)[0] == 1


def test_without_a_card_the_demo_can_be_served(capsys) -> None:
    """A processor is no fault where none but it was asked for."""
    torch = TorchFound("2.13.0+cpu", None, sees_gpu=False)
    code, said = ask(capsys, nvml=MissingNvml(), torch=torch, device="cpu")

    assert code == 0
    assert "none wanted: KLEIN_DEVICE is cpu" in said
    assert "shapes: KLEIN_DEVICE is cpu" in said


def test_a_card_that_is_not_there_is_told_by_number(capsys) -> None:
    """The second of one card."""
    code, said = ask(capsys, device=1, torch=replace(TORCH, sees_gpu=False))

    assert code == 1
    assert "there is no card 1; this machine has 1, counted from 0" in said


def test_a_model_that_is_nowhere_is_a_problem_and_not_a_crash(capsys) -> None:
    """Everything else is told all the same."""
    code, said = ask(capsys, model="/nowhere/at/all")

    assert code == 1
    assert "KLEIN_MODEL is a path at which there is nothing" in said
    assert "NVIDIA GeForce RTX 3060" in said


@pytest.mark.parametrize(
    ("cuda", "driver"), [("13.0", 580), ("12.8", 525), (None, 580), ("14.0", 580)]
)
def test_the_driver_must_be_new_enough_for_torchs_cuda(cuda, driver) -> None:
    """By NVIDIA's table; where torch says nothing, for the build that is pinned."""
    assert minimum_driver(cuda or PINNED_CUDA) == driver


CARD = GpuFacts(
    name="NVIDIA GeForce RTX 4070",
    driver="580.65.06",
    capability=(8, 9),
    total_bytes=12_884_901_888,
    free_bytes=11 * GB,
    holders=(Holder(4711, "blender", 1_500_000_000),),
)
FACTS = Facts(
    cards=(CardFound(CARD, TorchFound("2.13.0+cu130", "13.0", sees_gpu=True, runs=("fp8",))),),
    compiler=CompilerFound("/usr/bin/gcc", has_triton=True, has_headers=True),
    host=HostFound(32 * GB, 24 * GB),
    choice=Choice("flux.2-klein-4b", None, "it can hold it"),
    model=find_spec("flux.2-klein-4b"),
    cache=CacheFound("/models", 12_300_000_000, 0, 100 * GB, is_writable=True),
)


def judge(**changes: object):
    """The diagnosis of a good machine with *changes*, some of which are its card's."""
    of_card = {key: changes.pop(key) for key in ("gpu", "torch", "forecast") if key in changes}
    cards = (replace(FACTS.cards[0], **of_card),)
    return diagnose(replace(FACTS, cards=cards, **changes), Settings())


def test_a_good_machine_has_no_problems() -> None:
    """Not one, not even a small one."""
    assert judge().problems == []


def test_it_prints_the_sums_of_the_cache() -> None:
    """By kind and together; of an empty cache there is nothing to say."""
    told = dict(judge(stored={"published": 8 * GB, "quantized": 4 * GB}).lines)

    assert told["stored"] == "12.0 GB in the cache: published 8.0 GB, quantized 4.0 GB"
    assert "stored" not in dict(judge().lines)


@pytest.mark.parametrize(
    ("changes", "what", "remedy", "is_fatal"),
    [
        (
            {"gpu": replace(CARD, driver="570.124.06", cuda=(12, 8))},
            "The driver 570.124.06 is too old for torch 2.13.0+cu130",
            "driver 580 or newer",
            True,
        ),
        (
            {"gpu": replace(CARD, driver="390.157", cuda=None)},
            "The driver 390.157 is too old for torch 2.13.0+cu130",
            "driver 580 or newer",
            True,
        ),
        (
            {"gpu": replace(CARD, name="NVIDIA GeForce GTX 1080", capability=(6, 1))},
            "older than what CUDA 13 runs on",
            "RTX",
            True,
        ),
        (
            {"gpu": replace(CARD, name="NVIDIA GeForce RTX 2080", capability=(7, 5))},
            "does not calculate in bf16 itself",
            "RTX 3000",
            False,
        ),
        (
            {"torch": TorchFound("2.13.0+cpu", None, sees_gpu=False)},
            "built for processors only",
            "build for CUDA 13.0",
            True,
        ),
        (
            {"torch": TorchFound("2.13.0+cu130", "13.0", sees_gpu=False)},
            "NVML sees the card, but torch does not",
            "CUDA_VISIBLE_DEVICES",
            True,
        ),
        (
            {"compiler": CompilerFound(None, has_triton=True, has_headers=False)},
            "a C compiler, Python's headers missing",
            "gcc",
            False,
        ),
        (
            {"cache": CacheFound("/models", 12 * GB, 12 * GB, 3 * GB, is_writable=True)},
            "The disk has 3.0 GB free, needed are 12.0 GB",
            "KLEIN_CACHE_DIR",
            True,
        ),
        (
            {"cache": CacheFound("/models", 12 * GB, 1 * GB, 90 * GB, is_writable=False)},
            "/models may not be written to",
            "KLEIN_CACHE_DIR",
            True,
        ),
        (
            {"cache": CacheFound("/models", 12 * GB, 0, 90 * GB, is_writable=False)},
            "/models may not be written to",
            "KLEIN_CACHE_DIR",
            False,
        ),
        (
            {"host": HostFound(8 * GB, 5 * GB)},
            "5.0 GB of host memory are available",
            "swap",
            False,
        ),
        ({"forecast": "The card cannot do this."}, "cannot do this", "KLEIN_PRECISION", True),
    ],
)
def test_each_problem_has_its_remedy(changes, what, remedy, is_fatal) -> None:
    """One machine each, with one thing amiss; only what keeps it from serving is fatal."""
    found = judge(**changes)
    hits = [problem for problem in found.problems if what in problem.what]

    assert len(hits) == 1, found.problems
    assert remedy in hits[0].remedy
    assert hits[0].is_fatal is is_fatal
    assert found.can_serve is not is_fatal


@pytest.mark.torch
def test_a_card_that_is_full_is_told_by_whom(capsys, tmp_path) -> None:
    """Too little is free: who holds it is named, with how much."""
    code, said = ask(capsys, nvml=TalkingNvml(used_bytes=9 * GB), cache_dir=tmp_path)

    assert code == 1
    assert "3.9 GB of the card are free, which is too little" in " ".join(said.split())
    assert f"({os.getpid()}, 1.9 GB)" in said


@pytest.mark.torch
def test_what_a_start_refuses_is_refused_here_too(capsys, tmp_path) -> None:
    """One check for both: also where bf16's plan, one network at a time, has no least memory."""
    nvml = TalkingNvml(used_bytes=10 * GB)
    code, said = ask(capsys, nvml=nvml, cache_dir=tmp_path, precision="bf16")

    assert code == 1
    assert "2.9 GB of the card are free, which is too little" in " ".join(said.split())
    assert "2.9 GB free of 12.9 GB" in str(check_gpu(Gpu(0, load_nvml=lambda: nvml), "13.0"))


@pytest.mark.torch
def test_each_card_is_told(capsys, tmp_path) -> None:
    """Under its number, with a plan of its own; a problem names its card."""
    nvml = TalkingNvml(*CARDS)
    code, said = ask(capsys, nvml=nvml, cache_dir=tmp_path, device="2,0")

    lines = said.splitlines()
    names = [line for line in lines if line.startswith("card ")]
    assert [line.split()[1:3] for line in names] == [["card", "2,"], ["card", "0,"]]
    assert "NVIDIA GeForce RTX 4090" in names[0]
    assert sum(line.startswith("plan ") for line in lines) == 2
    assert code == 0

    code, said = ask(capsys, nvml=nvml, cache_dir=tmp_path, device="0,1,7")
    said = " ".join(said.split())
    assert code == 1
    assert "Card 1: 1.0 GB of the card are free, which is too little" in said
    assert "Card 7: NVML finds no card that can be used: there is no card 7; this machine" in said
    assert "Card 0: " not in said


@pytest.mark.torch
def test_of_all_cards_one_must_be_able_to_serve(capsys, tmp_path) -> None:
    """As the start does, which leaves the others out; scripts get each."""
    code, said = ask(capsys, "--json", nvml=TalkingNvml(*CARDS), cache_dir=tmp_path, device="all")
    document = json.loads(said)
    assert code == 0
    assert [each["name"] for each in document["cards"]] == ["card 0", "card 1", "card 2"]
    assert document["cards"][0]["card"] == document["card"]
    assert document["cards"][2]["forecast"]["plan"]["name"] == "resident"

    assert ask(capsys, nvml=TalkingNvml(CARDS[1]), cache_dir=tmp_path, device="all")[0] == 1


CARDS = (
    FakeCard("GPU-aaaa", bus=1),
    FakeCard("GPU-bbbb", bus=2, total_bytes=6 * GB, used_bytes=5 * GB),
    FakeCard("GPU-cccc", bus=3, name="NVIDIA GeForce RTX 4090", total_bytes=24 * GB),
)


@pytest.mark.torch
def test_a_card_that_is_not_there_is_computed(capsys) -> None:
    """From the datasheet and the planner, labelled as such, with the floors of its precisions."""
    code, said = ask(capsys, "--card", "rtx-3060")

    assert code == 0
    assert "28 SMs at 1.777 GHz" in said
    assert "int8: expected, the fastest that keeps its bound; computed" in said
    assert "attention  int8" in said
    assert "plan       resident" in said
    assert "bf16 5.99 s, int8 2.66 s" in said
    assert "fp8 5.99" not in said
    assert "Computed, nothing was measured" in said


@pytest.mark.torch
@pytest.mark.parametrize(
    ("card", "linears", "attention"),
    [("rtx-3060", "int8", "int8"), ("rtx-4070", "int8", "int8"), ("h200", "fp8", "cudnn")],
)
def test_a_card_that_is_not_there_races_on_paper(capsys, card, linears, attention) -> None:
    """At the rates of its datasheet, and the answer says so; by hand it is as asked."""
    ahead = json.loads(ask(capsys, "--card", card, "--json")[1])["forecast"]
    by_hand = ask(capsys, "--card", card, "--json", precision="bf16", attention="torch")[1]

    assert (ahead["precision"], ahead["attention"]) == (linears, attention)
    assert "computed from the datasheet" in ahead["precision_reason"]
    assert json.loads(by_hand)["forecast"]["attention"] == ""


@pytest.mark.torch
def test_what_was_timed_is_what_is_told(capsys, tmp_path) -> None:
    """Instead of what a probe would say; where nothing was timed, how that is done."""
    _, said = ask(capsys, cache_dir=tmp_path, torch=replace(TORCH, race=RTX_3060))
    _, before = ask(capsys, cache_dir=tmp_path)
    _, again = ask(capsys, "--race", cache_dir=tmp_path)

    told = " ".join(said.split())
    assert "timed here, ms a step: int8 350.0, bf16 1300.0; attention int8 90.0, torch" in told
    assert "attention int8, by the same times" in told
    assert "race not held yet; the first start does" in " ".join(before.split())
    assert "There is no card here on which the race could be held." in again


@pytest.mark.torch
def test_a_computed_answer_is_labelled_for_scripts_too(capsys) -> None:
    """With what was assumed of the card."""
    _, said = ask(capsys, "--card", "rtx-4060", "--json")

    document = json.loads(said)
    assert document["computed_for"] == "NVIDIA GeForce RTX 4060"
    assert document["assumed"]["free_bytes"] < document["card"]["memory_bytes"]
    assert document["forecast"]["plan"]["name"].startswith("streamed")


def test_a_card_without_a_datasheet_is_refused_with_those_that_have_one() -> None:
    """In one sentence on standard error, and nothing on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "doctor", "--card", "rtx-9999"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert "rtx-3060" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.torch
@pytest.mark.full
def test_it_answers_on_this_machine_whatever_it_is() -> None:
    """The real NVML, torch, compiler and disk: an exit code and a verdict, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert ("It can serve." in done.stdout) is (done.returncode == 0)
