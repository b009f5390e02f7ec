"""What the engine keeps in the cache is believed only where nobody else can have put it there."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.engine.config import EngineConfig
from app.engine.load import _downloaded
from app.engine.models import registry
from app.engine.runtime import kernels_choice
from app.errors import StartupError
from app.worker import supervisor
from tests.engine.hub import CONFIG, ENCODER, VARIANT, content
from tests.security.test_cache_trust import write_as_before
from tests.support.layout_files import build
from tests.support.owners import give_away
from tests.support.owners import owners as owners

pytestmark = pytest.mark.torch


class TestCompiledCode:
    """Code is run, so it comes from folders that nobody else may write to."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        """Which folder is used for the cache of the test; there is no home to fall back to."""
        monkeypatch.setenv("HOME", os.devnull)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "foreign"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        (tmp_path / "temporary").chmod(0o1777)

        def ask() -> Path:
            assert kernels_choice._keep_results(tmp_path / "cache") == ""
            return Path(os.environ["TRITON_CACHE_DIR"]).parent

        return ask

    def test_the_caches_own_is_private_and_kept(self, folder, tmp_path) -> None:
        """Also one that the version before made, so that it stays warm."""
        kept = tmp_path / "cache" / "compiled"
        assert folder() == kept
        assert kept.stat().st_mode & 0o777 == 0o700
        kept.chmod(0o755)
        assert folder() == kept
        (kept / "code.py").write_text("1")
        assert folder() == kept
        assert (kept / "code.py").exists()

    def test_triton_keeps_its_work_there(self, folder, tmp_path) -> None:
        """It would else follow a place that was set outside and that nobody has judged."""
        folder()
        kept = tmp_path / "cache" / "compiled" / "triton"
        assert os.environ["TRITON_CACHE_DIR"] == str(kept)
        if importlib.util.find_spec("triton"):
            assert importlib.import_module("triton").knobs.cache.dir == str(kept)

    @pytest.mark.parametrize("above", ["open", "open behind a link", "sticky"])
    def test_whoever_may_swap_the_cache_itself_is_not_believed(
        self, tmp_path, folder, above
    ) -> None:
        """A cache that is closed itself, below a folder in which others may rename it."""
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "between").mkdir(mode=0o755)
        (tmp_path / "shared" / "between" / "cache").mkdir(mode=0o755)
        if above == "open behind a link":
            (tmp_path / "link").symlink_to(tmp_path / "shared" / "between")
            (tmp_path / "cache").symlink_to(tmp_path / "link" / "cache")
        else:
            (tmp_path / "cache").symlink_to(tmp_path / "shared" / "between" / "cache")
        (tmp_path / "shared").chmod(0o1777 if above == "sticky" else 0o777)

        is_kept = folder() == tmp_path / "cache" / "compiled"
        assert is_kept == (above == "sticky")

    def test_the_home_comes_before_the_temporary_files(self, folder, tmp_path, monkeypatch) -> None:
        """What lies there outlasts a restart of the machine, and code may be run from it."""
        (tmp_path / "home").mkdir(mode=0o755)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)

        assert folder() == tmp_path / "home" / ".cache" / "klein-compiled"
        assert folder().stat().st_mode & 0o777 == 0o700
        (tmp_path / "home").chmod(0o775)
        assert folder().parent == tmp_path / "temporary"

    def test_where_nothing_can_be_kept_and_run_nothing_is_compiled(
        self, folder, tmp_path, monkeypatch, caplog
    ) -> None:
        """Docker mounts /tmp without the right to run code; every kernel would fail."""
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        monkeypatch.setattr(
            os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID)
        )

        reason = kernels_choice._keep_results(tmp_path / "cache")
        assert "noexec" in reason
        assert "1.6 times as long" in caplog.text
        assert "exec" in caplog.text
        left = {path.name for path in (tmp_path / "temporary").iterdir()}
        assert left <= {f"klein-compiled-{os.geteuid()}"}

    def test_without_a_place_the_kernels_are_off(self, monkeypatch, tmp_path) -> None:
        """And says why."""
        monkeypatch.setattr(kernels_choice, "_keep_results", lambda cache: "no place")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc")

        chosen = kernels_choice.choose_kernels(torch.device("cuda"), tmp_path)
        assert not chosen.is_on
        assert chosen.summary == "no own kernels: no place"

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
            monkeypatch.setattr(os, "access", lambda path, mode: path != compiled)

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
    build(folder, quantized_cache=cache)
    kept = list((cache / "converted").iterdir())
    for path in kept:
        give_away(path)
    build(folder, quantized_cache=cache)
    assert {path.stat().st_uid for path in kept} == {os.geteuid()}

    before = [path.stat().st_ino for path in kept]
    cache.chmod(0o777)
    build(folder, quantized_cache=cache)
    assert [path.stat().st_ino for path in kept] == before
    assert "quantized at each start" in caplog.text


class TestPartsOfAnEarlierDownload:
    """One file lacks parts, which come from the cache, whoever may write there."""

    @pytest.fixture
    def parts(self, tmp_path, monkeypatch):
        """Which of them are found in the cache of the test, by name, and what was reported."""
        cache = tmp_path / "cache"
        write_as_before(cache)
        monkeypatch.setattr(registry, "MODELS", {VARIANT.spec.id: VARIANT})
        config = EngineConfig(VARIANT.spec.id, "/some.safetensors", str(cache), None)

        def ask(stages: list[str] | None = None) -> dict[str, bytes] | None:
            heard = [] if stages is None else stages
            with _downloaded(config, lambda progress: heard.append(progress.stage)) as found:
                if found is None:
                    return None
                paths = [path for path in found.rglob("*") if path.is_file()]
                return {str(path.relative_to(found)): path.read_bytes() for path in paths}

        return ask

    def test_they_are_used_as_they_lie_where_nobody_else_may_write(self, parts) -> None:
        """Nothing is hashed: who may write there may do anything."""
        parts()  # renews the marks, which are those of the version before
        stages: list[str] = []
        found = parts(stages)
        assert found is not None
        assert found[CONFIG] == content(CONFIG)
        assert "verify" not in stages

    @pytest.mark.parametrize("is_read_only", [False, True])
    def test_they_are_hashed_first_where_others_may(
        self, parts, tmp_path, monkeypatch, is_read_only
    ) -> None:
        """A mounted volume, or a Windows drive; also one that is read-only."""
        cache = tmp_path / "cache"
        cache.chmod(0o777)
        if is_read_only:
            monkeypatch.setattr(Path, "symlink_to", refuse_below(cache, Path.symlink_to))
            monkeypatch.setattr(Path, "mkdir", refuse_below(cache, Path.mkdir))
        stages: list[str] = []

        assert parts(stages) == {path: content(path) for path in (CONFIG, ENCODER)}
        assert stages[0] == "verify"
        assert stages[-1] not in supervisor._FETCHING

    def test_a_planted_one_is_refused(self, parts, tmp_path) -> None:
        """By its hash, with what to do."""
        cache = tmp_path / "cache"
        cache.chmod(0o777)
        (planted,) = cache.glob(f"hub/*/*/{ENCODER}")
        planted.write_bytes(b"evil")

        with pytest.raises(StartupError, match=f"{ENCODER} .*is damaged.*klein download"):
            parts()

    def test_one_that_no_download_has_put_there_is_not_seen(self, parts, tmp_path) -> None:
        """A loader would prefer this index to the weights that were hashed."""
        cache = tmp_path / "cache"
        cache.chmod(0o777)
        (index,) = cache.glob("hub/*/*/model_index.json")
        for folder in (index.parent, cache / "models" / VARIANT.spec.id / "fp8"):
            (folder / "text_encoder" / "a.safetensors.index.json").write_text("evil")
        (cache / "model_index.json").write_text("evil")

        assert parts() == {path: content(path) for path in (CONFIG, ENCODER)}

    def test_those_of_another_model_or_revision_are_not_taken(self, parts, tmp_path) -> None:
        """Only the entry's own, at its commit: the first folder by name was taken once."""
        cache = tmp_path / "cache"
        (own,) = (index.parent for index in cache.glob("hub/*/*/model_index.json"))
        other = own.parent / ("0" * 40)
        shutil.copytree(own, other)
        (other / "model_index.json").write_text("another")
        shutil.copytree(other, cache / "a" / "model")

        found = parts()
        assert found is not None
        assert found[CONFIG] == content(CONFIG)
        shutil.rmtree(own)
        assert parts() is None

    def test_where_some_are_missing_none_is_used(self, parts, tmp_path, caplog) -> None:
        """The layout then says what it lacks, and the log what else could be meant."""
        cache = tmp_path / "cache"
        cache.chmod(0o777)
        (missing,) = cache.glob(f"hub/*/*/{ENCODER}")
        missing.unlink()

        assert parts() is None
        assert "others may write" in caplog.text


def refuse_below(folder: Path, method):
    """Let *method* fail there, as on a volume that is mounted read-only."""

    def ask(path: Path, *more, **options):
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return method(path, *more, **options)

    return ask
