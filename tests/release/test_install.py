"""The wheel goes into a fresh environment by the ways that people install programs, and serves.

Every file is fetched once, against the hashes of the lock; the installers then work without an
index, so that none of them can take another build of torch and gigabytes of CUDA with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.release.conftest import VERSION, Rehearsal
from tests.support.server import ROOT, Server

pytestmark = pytest.mark.system

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==[^\n]*(?:\n    --hash[^\n]*)*\n?", re.MULTILINE)
_OF_CUDA = re.compile(r"nvidia-(?!ml-py)|cuda-|triton")
PICTURE = {"prompt": "a red circle", "width": 128, "height": 128}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every wheel of the lock: torch as it is at hand here, the others by their
    hashes."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder))
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    run(*pip, torch)
    is_without_cuda = any(folder.glob("torch-*+cpu-*"))
    text = (ROOT / "requirements.hashes.lock").read_text()
    lines = "".join(
        entry[0]
        for entry in _PIN.finditer(text)
        if entry[1] != "torch" and not (is_without_cuda and _OF_CUDA.match(entry[1]))
    )
    listed = folder / "listed.txt"
    listed.write_text(lines)
    run(*pip, "--require-hashes", "--requirement", str(listed))
    # pipx keeps a pip of its own up to date.
    run(*pip, "pip")
    return folder


@pytest.fixture(autouse=True)
def _with_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would compile torch anew, and what is installed here goes with its folder."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


def test_pip(rehearsal: Rehearsal, wheels: Path, tmp_path: Path) -> None:
    """Into a virtual environment of its own; nothing that it wants is missing there."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    where = ("--no-index", "--find-links", str(wheels))

    run(*pip, "install", "--quiet", "--no-compile", *where, str(rehearsal.wheel))

    run(*pip, "check")
    assert_serves(python.with_name("klein"))


def test_pipx(rehearsal: Rehearsal, wheels: Path, tmp_path: Path) -> None:
    """As an application of its own, of which only `klein` is put on the path."""
    environ = {f"PIPX_{name}": str(tmp_path / name) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    pip = f"--no-index --find-links {wheels} --no-compile"
    words = ("install", "--backend", "pip", "--pip-args", pip, "--python", sys.executable)

    run(sys.executable, "-m", "pipx", *words, str(rehearsal.wheel), **environ)

    assert_draws(only_program(tmp_path / "BIN_DIR"), tmp_path)


def test_uv(rehearsal: Rehearsal, wheels: Path, tmp_path: Path) -> None:
    """`uv tool install`, with `--find-links` onto the torch at hand."""
    environ = {
        f"UV_{name}": str(tmp_path / name) for name in ("TOOL_DIR", "TOOL_BIN_DIR", "CACHE_DIR")
    }
    where = ("--no-config", "--no-index", "--find-links", str(wheels))
    uv = str(Path(sys.executable).with_name("uv"))

    run(uv, "tool", "install", *where, "--python", sys.executable, str(rehearsal.wheel), **environ)

    assert_draws(only_program(tmp_path / "TOOL_BIN_DIR"), tmp_path)


class Installed(Server):
    """The service of an installed `klein`."""

    def __init__(self, program: Path, **settings: object) -> None:
        self.program = program
        super().__init__(**settings)


def only_program(folder: Path) -> Path:
    """The one program that was put there."""
    (program,) = folder.iterdir()
    assert program.name == "klein"
    return program


def assert_serves(klein: Path) -> None:
    """It says its version, and `klein serve` makes a picture of the demo model."""
    assert VERSION in run(str(klein), "--version")
    with Installed(klein, model="shapes", device="cpu") as server:
        status, headers, picture = server.post("/generate", PICTURE)
        assert server.stop() == 0

    assert (status, headers["content-type"]) == (200, "image/png")
    assert picture.startswith(b"\x89PNG")
    shutil.rmtree(klein.parent.parent, ignore_errors=True)


def assert_draws(klein: Path, folder: Path) -> None:
    """It says its version, and `klein generate` loads the demo model and makes its picture."""
    assert VERSION in run(str(klein), "--version")
    picture = folder / "out.png"
    words = ("generate", "a red circle", "--model", "shapes", "-o", str(picture))
    run(str(klein), *words, KLEIN_DEVICE="cpu")

    assert picture.read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(folder, ignore_errors=True)


def run(*command: str, **environ: str) -> str:
    """Run an installer with nothing of the caller's own settings but where pip finds packages."""
    ours = ("KLEIN_", "PYTHONPATH", "VIRTUAL_ENV", "PIPX_", "UV_")
    given = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command,
        cwd="/",
        env=given | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
