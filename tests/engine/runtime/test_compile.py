"""What is compiled for which size, and that nothing is once the service is ready."""

from __future__ import annotations

import importlib.util
import shutil
from threading import Event

import pytest
import torch

from app.engine.runtime import compile as compile_module
from app.engine.runtime.compile import Compiler, choose_compiler

pytestmark = pytest.mark.torch


class Backend:
    """A compiler that only counts: what it compiled, and which of it ran."""

    def __init__(self) -> None:
        self.compiled = 0
        self.ran: list[int] = []

    def __call__(self, graph, _inputs):
        number, self.compiled = self.compiled, self.compiled + 1

        def run(*inputs):
            self.ran.append(number)
            return graph(*inputs)

        return run


@pytest.fixture
def backend():
    torch.compiler.reset()
    yield Backend()
    compile_module.thaw()
    torch.compiler.reset()


def double(weight, x):
    return (x @ weight).relu()


def make(backend):
    compiler = Compiler(is_on=True, has_graphs=False, reason="a test", backend=backend)
    function = compiler.compile(double)
    weight = torch.randn(4, 4)
    return lambda rows: function(weight, torch.ones(rows, 4))


def test_the_default_size_keeps_its_own_code(backend):
    """Two compilations: one for the first size, which it keeps, one for all others."""
    call = make(backend)
    for rows in (10, 20, 30, 10, 40, 20, 10):
        assert call(rows).shape == (rows, 4)

    assert backend.compiled == 2
    assert backend.ran == [0, 1, 1, 0, 1, 1, 0]


def test_a_failing_compiler_leaves_the_function_as_it_is(backend, caplog):
    """One warning, the right answer, and no second try; what is on says that something is not."""

    def fail(_graph, _inputs):
        nonlocal tries
        tries += 1
        raise RuntimeError("no such instruction on this card")

    tries = 0
    compiler = Compiler(is_on=True, has_graphs=False, reason="a test", backend=fail)
    function = compiler.compile(double)
    weight, x = torch.randn(4, 4), torch.ones(3, 4)

    assert compiler.summary == "compiled: a test"
    for _ in range(3):
        torch.testing.assert_close(function(weight, x), double(weight, x))
    assert tries == 1
    assert [each.name for each in caplog.records if each.levelname == "WARNING"] == [
        "app.engine.runtime.compile"
    ]
    assert compiler.summary == "not all compiled: BackendCompilerFailed"


def test_nothing_is_compiled_once_frozen(backend):
    """A size that was not foreseen runs as it is written, and others run on compiled."""
    call = make(backend)
    call(10)
    compile_module.freeze()

    assert call(7).shape == (7, 4)
    assert call(10).shape == (10, 4)
    assert (backend.compiled, backend.ran) == (1, [0, 0])


def test_the_processor_compiles_nothing(tmp_path):
    """Functions come back as they are."""
    compiler = choose_compiler(torch.device("cpu"), tmp_path)

    assert not compiler.is_on
    assert compiler.compile(double) is double


def test_a_missing_compiler_comes_with_the_command_that_installs_it(tmp_path, monkeypatch):
    """No Triton, no C compiler: everything runs uncompiled, and it is known why."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/" if name == "apt-get" else None)
    compiler = choose_compiler(torch.device("cuda"), tmp_path)

    assert (compiler.is_on, compiler.reason) == (False, "a C compiler and Triton missing")
    assert compiler.remedy.startswith("sudo apt-get install gcc g++ python3-dev && pip install ")


def test_the_compilers_processes_end_with_the_compiling(monkeypatch):
    """They are of no use to a service that is ready, and hold memory on the host."""
    from torch._inductor import async_compile

    ended = Event()
    monkeypatch.setattr(async_compile, "shutdown_compile_workers", ended.set)
    try:
        compile_module.freeze()
        assert ended.wait(10)
    finally:
        compile_module.thaw()
