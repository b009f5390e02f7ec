"""What Hugging Face's cache holds is linked, never downloaded again, and believed by its hash."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from app.engine.hub.cache import HubCache
from app.engine.hub.download import lay_out_shared, missing_bytes
from app.engine.hub.hf_cache import find_snapshot
from app.engine.models.registry import MODELS
from app.errors import StartupError
from app.model_choice import choose_model
from app.settings import Settings
from tests.engine.hub import CONFIG, ENCODER, FP8_BYTES, OWN, SINGLE, VARIANT, Downloads, content
from tests.support.hub import Hub

FILES = {file.path: file for file in (*VARIANT.shared, VARIANT.transformers["fp8"])}


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    """Where HF_HUB_CACHE leads; the service's own cache lies beside it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    return tmp_path / "huggingface" / "hub"


@pytest.fixture
def downloads(tmp_path):
    files = {
        (file.repository, file.revision, file.path): content(file.path) for file in FILES.values()
    }
    with Hub(files) as running:
        yield Downloads(running, tmp_path / "cache")


def put(cache: Path, path: str, data: bytes | None = None) -> Path:
    """Lay a file out as huggingface_hub does; the small one's blob has a name of git's."""
    file = FILES[path]
    folder = cache / f"models--{file.repository.replace('/', '--')}"
    blob = folder / "blobs" / ("5" * 40 if path == CONFIG else file.sha256)
    link = folder / "snapshots" / file.revision / path
    for each in (blob, link):
        each.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content(path) if data is None else data)
    link.symlink_to(blob)
    return blob


def test_what_is_there_is_linked(downloads, hf_cache) -> None:
    """Blobs by their SHA-256, small files by the pinned snapshot; what lacks is downloaded."""
    blobs = [put(hf_cache, path) for path in (CONFIG, ENCODER)]
    assert missing_bytes(VARIANT, downloads.cache, "fp8") == len(content(SINGLE))

    folder = downloads.run()

    assert [seen.path.rpartition("/")[2] for seen in downloads.hub.seen] == [SINGLE]
    assert all((folder / path).read_bytes() == content(path) for path in FILES)
    assert (folder / ENCODER).samefile(blobs[1])
    assert all(HubCache(downloads.cache).is_verified(file) for file in FILES.values())
    # Whoever empties that cache takes nothing away here.
    for blob in blobs:
        blob.unlink()
    downloads.hub.seen.clear()
    assert (downloads.run() / ENCODER).read_bytes() == content(ENCODER)
    assert downloads.hub.seen == []


def test_from_another_disk_it_is_a_symbolic_link(downloads, hf_cache, monkeypatch) -> None:
    """Trusted only while nobody else may replace what it leads to."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    blob = put(hf_cache, ENCODER)
    store = HubCache(downloads.cache)
    downloads.run()

    assert store.path(FILES[ENCODER]).resolve() == blob
    assert store.is_verified(FILES[ENCODER])
    blob.parent.chmod(0o777)
    assert not store.is_verified(FILES[ENCODER])


@pytest.mark.parametrize("size", ["same size", "another size"])
def test_another_file_under_the_name_is_left_alone(downloads, hf_cache, size) -> None:
    """It is neither used nor deleted, and the right one is downloaded."""
    wrong = content(ENCODER)[:-1] + (b"?" if size == "same size" else b"")
    blob = put(hf_cache, ENCODER, wrong)

    folder = downloads.run()

    assert (folder / ENCODER).read_bytes() == content(ENCODER)
    assert blob.read_bytes() == wrong
    assert not list(downloads.cache.rglob("*.link"))


def test_one_that_others_may_write_is_hashed_at_each_start(downloads, hf_cache) -> None:
    """As any file of the cache."""
    put(hf_cache, ENCODER).chmod(0o666)
    downloads.run()
    downloads.progress.clear()

    downloads.run()
    assert {progress.stage for progress in downloads.progress} == {"verify"}


def test_parts_that_a_file_lacks_come_from_there_too(downloads, hf_cache, tmp_path) -> None:
    """All of them or none, and without the network."""
    put(hf_cache, CONFIG)
    assert not lay_out_shared(VARIANT, downloads.cache, tmp_path / "parts", lambda _: None)
    put(hf_cache, ENCODER)

    assert lay_out_shared(VARIANT, downloads.cache, tmp_path / "parts", lambda _: None)
    assert (tmp_path / "parts" / ENCODER).read_bytes() == content(ENCODER)
    assert downloads.hub.seen == []


def test_an_empty_cache_changes_nothing(downloads, hf_cache) -> None:
    """Nothing is looked for in vain, and nothing made there."""
    downloads.run()
    assert len(downloads.hub.seen) == 3
    assert not hf_cache.exists()
    assert missing_bytes(VARIANT, hf_cache, "fp8") == FP8_BYTES


class TestAsAModel:
    """KLEIN_MODEL may be a repository's folder in that cache."""

    @pytest.fixture
    def folder(self, hf_cache) -> Path:
        folder = hf_cache / f"models--{OWN.replace('/', '--')}"
        for name in ("a" * 40, "b" * 40):
            self.fill(folder, name)
        # Somebody has only looked at a README here.
        (folder / "snapshots" / ("c" * 40)).mkdir()
        return folder

    def fill(self, folder: Path, name: str) -> Path:
        """Make a snapshot of a model."""
        path = folder / "snapshots" / name
        path.mkdir(parents=True)
        (path / "model_index.json").write_text("{}")
        return path

    def choose(self, path: Path):
        return choose_model(Settings(model=str(path), device="cpu"), None)

    def test_the_pinned_snapshot_is_taken(self, folder) -> None:
        """Before that of the branch."""
        pinned = self.fill(folder, MODELS["flux.2-klein-4b"].revision)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("b" * 40)

        choice = self.choose(folder)
        assert choice.path == str(pinned)
        assert choice.reason == "KLEIN_MODEL is a path in Hugging Face's cache"

    def test_else_the_branchs_else_the_only_one(self, folder) -> None:
        """Where several could be meant, none is guessed."""
        with pytest.raises(StartupError, match="2 snapshots that could be meant"):
            self.choose(folder)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("b" * 40 + "\n")
        assert find_snapshot(folder).name == "b" * 40
        (folder / "refs" / "main").unlink()
        (folder / "snapshots" / ("b" * 40) / "model_index.json").unlink()
        assert find_snapshot(folder).name == "a" * 40

    def test_a_file_of_it_keeps_its_name(self, hf_cache) -> None:
        """Its blob's name has no suffix, and nothing lies beside it."""
        put(hf_cache, SINGLE)
        (link,) = hf_cache.glob(f"*/snapshots/*/{SINGLE}")

        assert self.choose(link).path == str(link)
