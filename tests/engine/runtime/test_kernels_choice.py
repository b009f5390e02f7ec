"""Whether our own kernels run, and what is said where they do not."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from app.engine.kernels import int8_linear, triton_check
from app.engine.runtime import kernels_choice
from app.engine.runtime.kernels_choice import choose_kernels
from app.engine.runtime.toolchain import CompilerFound

pytestmark = pytest.mark.torch

CARD = torch.device("cuda")


@pytest.fixture(autouse=True)
def _undo(monkeypatch) -> None:
    """A card of Hopper's, and no refusal that outlives the test."""
    monkeypatch.setattr(triton_check, "_refusal", [""])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.fixture
def whole(monkeypatch) -> None:
    """A card with Triton, a C compiler and a folder; Python's headers are missing."""
    found = CompilerFound("/usr/bin/gcc", has_triton=True, has_headers=False)
    monkeypatch.setattr(kernels_choice, "find_compiler", lambda: found)
    monkeypatch.setattr(kernels_choice, "_keep_results", lambda cache: "")
    monkeypatch.setattr(kernels_choice, "triton_fault", lambda: "")


def test_the_processor_needs_no_kernels(tmp_path: Path) -> None:
    """And nothing need be installed for it."""
    chosen = choose_kernels(torch.device("cpu"), tmp_path)

    assert (chosen.is_on, chosen.has_graphs, chosen.remedy) == (False, False, "")


def test_an_exact_precision_needs_neither_triton_nor_a_folder(tmp_path, whole, monkeypatch):
    """The libraries' own modules run; nothing is tried, made or warned of."""
    monkeypatch.setattr(kernels_choice, "_keep_results", lambda cache: pytest.fail("a folder"))
    monkeypatch.setattr(triton_check, "_try_triton", lambda: pytest.fail("launched"))

    assert choose_kernels(CARD, tmp_path, is_exact=True) is kernels_choice.EXACT
    assert triton_check.triton_fault() == kernels_choice.EXACT.reason


def test_a_missing_compiler_comes_with_the_command_that_installs_it(tmp_path, monkeypatch):
    """No Triton, no C compiler: everything runs in torch, and it is known why."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/" if name == "apt-get" else None)
    chosen = choose_kernels(CARD, tmp_path)

    assert (chosen.is_on, chosen.reason) == (False, "a C compiler and Triton missing")
    assert chosen.remedy.startswith("sudo apt-get install gcc python3-dev && pip install ")
    assert triton_check.triton_fault() == chosen.reason
    assert int8_linear.fault(CARD) == chosen.reason


def test_no_kernel_is_launched_where_code_cannot_be_kept(tmp_path, whole, monkeypatch):
    """Or Triton would keep it in a folder that nobody has checked, and run it from there."""
    monkeypatch.setattr(kernels_choice, "_keep_results", lambda cache: "the folder is open")
    monkeypatch.setattr(triton_check, "_try_triton", lambda: pytest.fail("launched"))

    assert not choose_kernels(CARD, tmp_path).is_on
    assert triton_check.triton_fault() == "the folder is open"


def test_headers_may_be_missing_where_a_kernel_runs_all_the_same(tmp_path, whole) -> None:
    """What calls it was compiled before, by a machine that had them."""
    chosen = choose_kernels(CARD, tmp_path)

    assert (chosen.is_on, chosen.has_graphs, chosen.remedy) == (True, True, "")
    assert chosen.summary == "own kernels: Triton and a C compiler are there"


def test_a_kernel_that_does_not_run_turns_all_off_and_names_what_is_missing(
    tmp_path, whole, monkeypatch
) -> None:
    """With a compiler but without Python.h the first kernel fails, not the start."""
    monkeypatch.setattr(kernels_choice, "triton_fault", lambda: "Triton's kernels do not run here")
    chosen = choose_kernels(CARD, tmp_path)

    assert not chosen.is_on
    assert chosen.summary == "no own kernels: Triton's kernels do not run here"
    assert "python3-dev" in chosen.remedy or "Python's headers" in chosen.remedy
