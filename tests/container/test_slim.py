"""What is taken out of the image's environment, and what must stay in it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ROOT

SCRIPT = ROOT / "docker" / "slim.py"


@pytest.fixture(scope="module")
def slim():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("slim", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_listed_goes_and_nothing_else(slim, tmp_path: Path) -> None:
    """With its bytes counted; a name that begins alike stays, and so does what is needed."""
    gone = [
        "comfy_kitchen/backends/hip/_C.so",
        "torch/bin/protoc",
        "torch/include/ATen/ATen.h",
        "torch/lib/libasmjit.a",
        "sympy/core/tests/test_core.py",
        "pip/__init__.py",
        "pip-26.0.dist-info/METADATA",
        "yaml/__pycache__/loader.cpython-312.pyc",
    ]
    stays = [
        "comfy_kitchen/backends/cuda/_C.so",
        "torch/bin/torch_shm_manager",
        "torch/lib/libtorch_cpu.so",
        "torch/testing/__init__.py",
        "sympy/testing/__init__.py",
        "pipeline/__init__.py",
    ]
    for name in (*gone, *stays):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")

    freed = slim.remove_unused(tmp_path)

    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(stays)
    assert freed == 5 * len(gone)


def test_every_entry_says_why(slim) -> None:
    """And none reaches out of the environment."""
    for pattern, reason in (slim.UNUSED | slim.KEPT).items():
        assert reason
        assert not pattern.startswith(("/", "."))
        assert ".." not in pattern


@pytest.mark.torch
@pytest.mark.full
def test_what_it_compiles_can_be_imported_here() -> None:
    """A name that a library has no longer is seen here, and not in the image's build alone."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import slim; from pathlib import "
        "Path; slim.WHOLE = (); print(*slim.compile_imported(Path('/')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    missing = [line for line in done.stdout.splitlines() if line]
    # Triton comes with torch's CUDA build, Ray with an extra that the image has not.
    assert [each for each in missing if "triton" not in each and "'ray'" not in each] == []
