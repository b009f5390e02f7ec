"""The registry of attention kernels: which is taken, and what one more takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.engine.models.registry import find_model
from app.engine.modules import attention
from app.engine.modules.attention import (
    KERNELS,
    AttentionKernel,
    check_attention,
    choice_of,
    choose_attention,
    plain_attention,
)
from tests.support.layout_files import SPEC, latents, load_model

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
ARCHITECTURE = find_model("shapes").architecture


def test_one_more_kernel_is_one_entry(tiny_klein, tmp_path, monkeypatch):
    """It is probed, chosen, shown, and computes the blocks of a picture."""
    calls = []

    def dummy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(q.shape)
        return plain_attention(q, k, v)

    monkeypatch.setitem(KERNELS, "dummy", AttentionKernel("a dummy", dummy, lambda device: ""))
    loaded = load_model(tiny_klein, "fp8", tmp_path)
    calls.clear()
    latents(loaded)

    assert "attention by a dummy" in loaded.features
    # Two double and two single blocks a step, of two heads of size 32.
    assert len(calls) == 4 * SPEC.num_inference_steps
    assert {(shape[1], shape[3]) for shape in calls} == {(2, 32)}


def fail(*_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (AttentionKernel("other", plain_attention, lambda device: "for others"), "for others"),
        (AttentionKernel("broken", fail, lambda device: ""), "it does not run here"),
        (AttentionKernel("wrong", lambda q, k, v: -v, lambda device: ""), "its relative error is"),
        (AttentionKernel("nan", lambda q, k, v: v / 0, lambda device: ""), "its relative error is"),
    ],
    ids=lambda each: each.name if isinstance(each, AttentionKernel) else "",
)
def test_a_kernel_that_is_not_right_here_is_left_out(kernel, reason, monkeypatch):
    """torch's own choice is taken instead, and the reason can be told."""
    monkeypatch.setitem(KERNELS, "dummy", kernel)

    assert choose_attention(CPU, ARCHITECTURE) is KERNELS["torch"]
    assert attention.kernel_fault(kernel, CPU, ARCHITECTURE).startswith(reason)


def test_each_kernel_has_its_own_bound(monkeypatch):
    """One that is a little wrong is taken where its entry admits that."""
    little = AttentionKernel(
        "little", lambda q, k, v: 1.2 * plain_attention(q, k, v), lambda device: "", max_error=0.25
    )
    monkeypatch.setitem(KERNELS, "little", little)

    assert choose_attention(CPU, ARCHITECTURE) is little


def test_what_must_win_is_not_taken_without_a_race(monkeypatch):
    """Though it is right and the last; by its name it is."""
    other = AttentionKernel("other", lambda q, k, v: plain_attention(q, k, v), lambda device: "")
    monkeypatch.setitem(KERNELS, "other", replace(other, must_win=True))

    assert choose_attention(CPU, ARCHITECTURE) is KERNELS["torch"]
    assert choose_attention(CPU, ARCHITECTURE, "other") is KERNELS["other"]


def test_what_was_taken_can_be_asked_for() -> None:
    """By the setting's word, as the other cards of a service are told to."""
    for kernel in KERNELS.values():
        choice = choice_of(kernel)
        check_attention(choice)
        assert KERNELS[choice] is kernel
