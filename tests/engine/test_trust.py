"""What the engine keeps in the cache is believed only where nobody else can have put it there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from app.engine import compiling
from app.engine.config import EngineConfig
from app.engine.start import _downloaded
from tests.engine.download import CONFIG, VARIANT
from tests.engine.layout_files import build
from tests.owners import give_away
from tests.owners import owners as owners
from tests.security.test_cache_trust import write_as_before

pytestmark = pytest.mark.torch


class TestCompiledCode:
    """Code is run, so it comes from folders that nobody else may write to."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        """Which folder is used for the cache of the test."""
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()

        def ask() -> Path:
            compiling._keep_results(tmp_path / "cache")
            return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

        return ask

    def test_the_caches_own_is_private_and_kept(self, folder, tmp_path) -> None:
        """Also one that the version before made, so that it stays warm."""
        assert folder() == tmp_path / "cache" / "compiled"
        assert folder().stat().st_mode & 0o777 == 0o700
        folder().chmod(0o755)
        (folder() / "code.py").write_text("1")
        assert (folder() / "code.py").exists()

    @pytest.mark.parametrize("what", ["folder", "planted", "deep", "cache", "read-only"])
    def test_one_that_is_open_is_not_used(
        self, folder, tmp_path, caplog, what, monkeypatch
    ) -> None:
        """A private one is, the same at the next start, and the log says why and what to do."""
        compiled = folder()
        (compiled / "ab").mkdir()
        (compiled / "ab" / "code.py").write_text("evil")
        if what == "folder":
            compiled.chmod(0o770)
        elif what == "planted":
            give_away(compiled / "ab" / "code.py")
        elif what == "deep":
            (compiled / "ab").chmod(0o707)
        elif what == "cache":
            give_away(tmp_path / "cache")
        else:
            monkeypatch.setattr(os, "access", lambda path, mode: False)

        private = folder()
        assert private.parent == tmp_path / "temporary"
        assert private.stat().st_mode & 0o777 == 0o700
        assert list(private.iterdir()) == []
        assert folder() == private
        assert "set KLEIN_CACHE_DIR" in caplog.text

    @pytest.mark.parametrize("plant", ["folder", "open", "link", "file"])
    def test_the_private_one_is_not_planted_either(self, folder, tmp_path, plant) -> None:
        """Whoever foresees its name gains nothing: another is made for this start."""
        (tmp_path / "cache").mkdir(mode=0o777)
        (tmp_path / "cache").chmod(0o777)
        foreseen = tmp_path / "temporary" / f"klein-compiled-{os.geteuid()}"
        if plant == "link":
            foreseen.symlink_to(tmp_path)
        elif plant == "file":
            foreseen.touch()
        else:
            foreseen.mkdir(mode=0o700)
        if plant == "folder":
            give_away(foreseen)
        elif plant == "open":
            foreseen.chmod(0o777)

        assert folder() != foreseen
        assert folder().parent == tmp_path / "temporary"
        assert folder().stat().st_mode & 0o777 == 0o700


def test_rounded_weights_of_somebody_elses_are_made_anew(tiny_klein, tmp_path, caplog) -> None:
    """They decide the pictures, and nothing hashes them."""
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    cache = tmp_path / "cache"
    build(folder, converted=cache)
    kept = list((cache / "converted").iterdir())
    for path in kept:
        give_away(path)
    build(folder, converted=cache)
    assert {path.stat().st_uid for path in kept} == {os.geteuid()}

    before = [path.stat().st_ino for path in kept]
    cache.chmod(0o777)
    build(folder, converted=cache)
    assert [path.stat().st_ino for path in kept] == before
    assert "rounded at each start" in caplog.text


def test_a_part_is_not_taken_from_a_cache_that_is_open(tmp_path, caplog) -> None:
    """A single file lacks parts, which come from an earlier download: only from one of our own."""
    cache = tmp_path / "cache"
    write_as_before(cache)
    config = EngineConfig(VARIANT.card.id, "/some.safetensors", str(cache), None)
    found = _downloaded(config)
    assert found is not None
    assert (found / CONFIG).is_file()

    give_away(cache)
    assert _downloaded(config) is None
    assert "belongs to another user" in caplog.text
