"""A worker sees its own card alone, near whose memory it runs, and nothing asks for one before."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from app.domain import Device
from app.engine.config import EngineConfig
from app.errors import StartupError
from app.worker import child, placement
from app.worker.messages import StartFailed
from app.worker.placement import near_cores, see_only, settle
from app.worker.transport import pair
from tests.worker.conftest import CONFIG

SET = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_NVML_BASED_CUDA_CHECK")
PCI = "0000:65:00.0"
CARD = Device(1, "NVIDIA GeForce RTX 3060", "GPU-aaaa", visible="GPU-aaaa", pci_id=PCI)


def tell(config: EngineConfig) -> NoReturn:
    """Answer with what the process was set to when the engine is made."""
    seen = {name: os.environ.get(name) for name in (*SET, "OMP_NUM_THREADS")}
    raise StartupError(json.dumps(seen | {"torch": "torch" in sys.modules}))


@pytest.fixture
def ask_child(monkeypatch):
    """Start a worker process that was given a place, and return what it was set to."""
    for name in (*SET, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def ask(place: Device) -> dict[str, object]:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = pair(context)
        config = replace(CONFIG, device=place.torch_index, place=place)
        given = (theirs, tell, config, ("text", "info"))
        process = context.Process(target=child.main, args=given)
        process.start()
        theirs.close()
        said = pipe.recv()
        process.join(10)
        pipe.close()
        assert isinstance(said, StartFailed)
        return json.loads(said.message)

    return ask


def test_the_process_is_settled_before_its_engine_is_made(ask_child) -> None:
    """CUDA's variables stand before torch is imported, whatever the parent's are."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "3,1"

    assert ask_child(CARD) == {
        "CUDA_VISIBLE_DEVICES": "GPU-aaaa",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "OMP_NUM_THREADS": None,
        "torch": False,
    }


@pytest.fixture
def own(monkeypatch):
    """This process, whose variables and cores are put back; the cores that it was given."""
    given = []
    for name in (*SET, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: given.append(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    return given


def test_a_card_that_only_torch_knows_leaves_what_cuda_shows(own) -> None:
    """Then the index counts among these."""
    settle(Device(1, "card 1", ""))

    assert [os.environ[name] for name in SET] == ["as it was", "PCI_BUS_ID", "1"]
    assert own == []


def test_several_cards_are_shown_in_their_order(own) -> None:
    """To the commands that ask torch of each."""
    see_only([CARD, replace(CARD, visible="GPU-bbbb")])

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa,GPU-bbbb"


def test_a_process_without_a_card_gets_its_threads(own) -> None:
    """As many as it was given; one alone keeps what torch takes."""
    settle(Device(None, "cpu", "cpu"))
    assert os.environ["OMP_NUM_THREADS"] == "as it was"

    settle(Device(None, "cpu", "cpu:0", threads=3))
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert own == []


def test_it_runs_near_its_card(own, monkeypatch) -> None:
    """On those of its cores that are; where none is known, it stays on all."""
    asked = []
    answers = [frozenset({2, 3}), frozenset()]
    monkeypatch.setattr(
        placement, "near_cores", lambda *given: asked.append(given) or answers[len(asked) - 1]
    )
    settle(CARD)
    settle(CARD)

    assert asked == [(PCI, {0, 1, 2, 3})] * 2
    assert own == [frozenset({2, 3})]


@pytest.mark.parametrize(
    ("node", "listed", "expected"),
    [
        ("1\n", "2-3,8-9\n", {2, 3, 8}),
        ("0\n", "0-63\n", {0, 1, 2, 3, 8}),
        ("1\n", "4\n", set()),
        ("-1\n", "0-63\n", set()),
        (None, "0-63\n", set()),
        ("1\n", None, set()),
        ("1\n", "\n", set()),
    ],
)
def test_the_cores_of_a_card_are_the_kernels(
    tmp_path: Path, node: str | None, listed: str | None, expected: set[int]
) -> None:
    """Those of its NUMA node that may be used; none where there is no node, file or common core."""
    folder = tmp_path / PCI
    folder.mkdir()
    for name, text in (("numa_node", node), ("local_cpulist", listed)):
        if text is not None:
            (folder / name).write_text(text)

    assert near_cores(PCI, {0, 1, 2, 3, 8}, tmp_path) == expected
    assert near_cores("0000:66:00.0", {0, 1}, tmp_path) == frozenset()


ASKED = """
import sys
import app.cli.serve, app.worker.child
assert "torch" not in sys.modules, "the parent imports torch"
import torch

def refuse(*_given, **_named):
    raise AssertionError("asked for a card")

for name in ("init", "_lazy_init", "is_available", "device_count", "current_device",
             "get_device_capability", "get_device_properties", "get_device_name"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice"):
    setattr(torch._C, name, refuse)
import app.engine.engine
assert not torch.cuda.is_initialized()
"""


@pytest.mark.torch
@pytest.mark.full
def test_no_import_asks_for_a_card() -> None:
    """Neither CUDA nor the number of cards, in the server and in all that the engine imports.

    A process that is forked afterwards could use no card, and one that has a card of its own would
    hold memory on the first.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr
