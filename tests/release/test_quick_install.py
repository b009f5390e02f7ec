"""What installs the tests' packages takes them from where pip would, or leaves it to pip."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support import packages

LISTED = r"""
:env:.cert='/certificates.crt'
:env:.find-links='/wheels'
global.constraint='/constraints.txt'
global.extra-index-url='file:///first/simple\nhttps://second.example/simple'
global.find-links='/elsewhere'
install.index-url='https://mirror.example/simple'
"""


def test_pips_settings_become_options_of_uv() -> None:
    """The environment wins over the files; each of several indexes is named."""
    settings = packages.read(LISTED)

    assert settings["cert"] == "/certificates.crt"
    assert [*packages.sources(settings)] == [
        *("--default-index", "https://mirror.example/simple"),
        *("--index", "file:///first/simple"),
        *("--index", "https://second.example/simple"),
        *("--find-links", "/wheels"),
        *("--constraint", "/constraints.txt"),
    ]
    assert [*packages.sources({"no-index": "true"})] == ["--no-index"]
    assert [*packages.sources({"no-index": "0"})] == []


@pytest.mark.full
@pytest.mark.parametrize("is_quick", [True, False])
def test_a_package_is_installed_where_it_shall_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quick: bool
) -> None:
    """By pip where uv cannot; and what neither can is told in pip's words."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text('[project]\nname = "probe"\nversion = "1"\n')
    (source / "probe.py").write_text("")
    wheel = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([*wheel, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    if not is_quick:
        monkeypatch.setattr(packages, "_uv", lambda: "false")

    packages.install("--no-index", "--find-links", tmp_path, "probe", python=python)

    subprocess.run([str(python), "-c", "import probe"], check=True)
    (installer,) = (tmp_path / "env").rglob("probe-1.dist-info/INSTALLER")
    assert installer.read_text().strip() == ("uv" if is_quick else "pip")
    with pytest.raises(AssertionError, match="No matching distribution"):
        packages.install("--no-index", "no-such-package", python=python)
