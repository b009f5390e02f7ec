"""The wheel is whole: what is installed from it works with nothing of the repository in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.server import ROOT


@pytest.mark.system
def test_a_wheel_draws_from_an_empty_folder(tmp_path: Path) -> None:
    """`klein generate` with the demo model inside, in an environment that has only the libraries
    and the wheel.
    """
    from PIL import Image

    source = tmp_path / "source"
    # A copy, since the build leaves its own files beside the sources, and takes up older ones.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    klein = _install(wheel, tmp_path / "fresh")
    empty = tmp_path / "empty"
    empty.mkdir()

    words = [str(klein), "generate", "a red circle", "-o", "out.png", "--model", "shapes"]
    _run(*words, cwd=empty)

    picture = Image.open(empty / "out.png").convert("RGB")
    red, green, blue = picture.getpixel((picture.width // 2, picture.height // 2))
    assert picture.size == (256, 256)
    assert red > 180
    assert max(green, blue) < 90
    assert min(picture.getpixel((5, 5))) > 230
    adapters, checkpoint = [], []
    for each in _demo(wheel):
        (adapters if "/loras/" in each.filename else checkpoint).append(each.file_size)
    assert sum(checkpoint) < 10_000_000
    assert 0 < sum(adapters) < 300_000


def _install(wheel: Path, place: Path) -> Path:
    """Make an environment of the libraries here and *wheel*; return its `klein`."""
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    # A folder named in a .pth file gives its packages, but not what an editable install put there.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    _run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    where = _run(str(python), "-c", "import app; print(app.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(site)
    return place / "bin" / "klein"


def _demo(wheel: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(wheel) as file:
        found = [each for each in file.infolist() if "/models/data/shapes/" in each.filename]
    assert found
    return found


def _run(*command: str, cwd: Path | None = None) -> str:
    ours = ("KLEIN_", "PYTHONPATH")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ | {"KLEIN_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
