"""The image is built and the service run in it, without an engine: see tools/image_check.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import image_check_build

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.system
def test_the_image_builds_and_serves_confined() -> None:
    """Base, build, facts, Triton, a picture, SIGTERM: every step of the check holds."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "image_check.py")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2700,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("The image holds")


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    """The check has a time limit for everything it starts, and leaves nothing behind."""
    with pytest.raises(image_check_build.CheckFailed, match="no end within"):
        image_check_build.run(["sh", "-c", "sleep 60 & sleep 60"], limit_s=0.2)


def test_a_command_that_fails_says_what_it_said() -> None:
    """Exit code, command and its last words."""
    with pytest.raises(image_check_build.CheckFailed, match=r"^3 from sh -c .*\nno base$"):
        image_check_build.run(["sh", "-c", "printf 'no base'; exit 3"], limit_s=20)


def test_the_build_finds_packages_where_this_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of wheels and an index in a folder are mounted where pip's settings name them."""
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    wheels.mkdir()
    index.mkdir(parents=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index.as_uri()} https://index.example/simple")

    mounts = {target: source for source, target in image_check_build.pip_mounts(tmp_path)}

    lines = mounts.pop("/etc/pip.conf").read_text().splitlines()
    assert f"find-links = {wheels}" in lines
    assert f"extra-index-url = {index.as_uri()} https://index.example/simple" in lines
    assert {str(wheels), str(index.parent)} <= mounts.keys()
