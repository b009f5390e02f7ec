"""What lies in the cache is listed, and pruned only where it can be made or fetched again."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.engine.hub import disk
from app.engine.hub.cache import HubCache
from app.engine.hub.disk import Kind
from app.engine.hub.trust import whole_file
from app.engine.models.flux2_klein import KLEIN, KLEIN_BASE

SERVED = KLEIN.transformers["fp8"]
OTHER = next(file for file in KLEIN_BASE.files if file not in KLEIN.files)
OLD = "transformer-int8-0123456789ab.safetensors"
NEW = "encoder-fp8w-ba9876543210.safetensors"

HOLDER = """
import sys
from pathlib import Path
from app.engine.hub import disk
disk.hold_published(Path(sys.argv[1]), Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _nothing_is_held():
    yield
    disk.release()


def put(path: Path, size: int, used_at: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used_at, used_at))
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    """Two models, one download under way, two quantized files and compiled code: 3,120 bytes."""
    for file, size in ((SERVED, 1000), (OTHER, 500)):
        path = put(HubCache(tmp_path).path(file), size, 50)
        put(Path(f"{path}.verified"), 10, 60)
    HubCache(tmp_path).link("flux.2-klein-4b/fp8", [SERVED])
    HubCache(tmp_path).link("flux.2-klein-base-4b/bf16", [OTHER])
    put(HubCache(tmp_path).path(SERVED).with_name("more.safetensors.part"), 300, 50)
    put(tmp_path / "converted" / OLD, 400, 100)
    put(tmp_path / "converted" / NEW, 600, 300)
    put(tmp_path / "compiled" / "ab" / "code.py", 200, 1)
    os.utime(tmp_path / "compiled", (200, 200))
    put(tmp_path / "race" / "card.json", 100, 400)
    return tmp_path


def names(stored) -> list[str]:
    return [each.path.name for each in stored]


def test_everything_is_listed_by_kind_with_its_last_use(cache) -> None:
    """Bytes, and the times of records and files; partial downloads count once."""
    stored = disk.survey(cache)

    assert disk.sums(stored) == {
        "published": 1520,
        "quantized": 1000,
        "compiled": 200,
        "partial": 300,
        "race results": 100,
    }
    used = {each.path.name: each.used_at for each in stored}
    assert (used[OLD], used["compiled"]) == (100, 200)
    assert {each.used_at for each in stored if each.kind is Kind.PUBLISHED} == {60}
    assert any("flux.2-klein-4b" in each.name for each in stored)


def test_derived_files_go_first_the_least_recently_used_before_others(cache) -> None:
    """Down to the limit and no further; a service deletes nothing published at all."""
    pruned = disk.prune(cache, 2600)

    assert names(pruned.removed) == [OLD, "compiled"]
    assert pruned.left_bytes == 2520 == sum(each.size_bytes for each in disk.survey(cache))
    assert names(disk.prune(cache, 0).removed) == [NEW]
    assert HubCache(cache).is_present(OTHER)


def test_then_go_models_that_are_not_served(cache) -> None:
    """With their records and links; the served model and its partial download stay."""
    pruned = disk.prune(cache, 0, served=KLEIN.files)

    assert names(pruned.removed)[-1] == OTHER.revision
    assert not HubCache(cache).path(OTHER).parent.exists()
    assert not [path for path in cache.rglob("*") if path.is_symlink() and not path.exists()]
    assert HubCache(cache).is_present(SERVED)
    assert len(list(cache.rglob("*.part"))) == 1


def test_a_trial_deletes_nothing(cache) -> None:
    """It tells the same."""
    before = disk.survey(cache)
    pruned = disk.prune(cache, 0, served=KLEIN.files, is_trial=True)

    assert len(pruned.removed) == 4
    assert disk.survey(cache) == before


def test_what_another_process_holds_stays_until_it_ends(cache) -> None:
    """A model that no setting here names, loaded by a service elsewhere on this disk."""
    link = next(
        path
        for path in (cache / "models").rglob("*")
        if path.resolve().parent.parent == HubCache(cache).path(OTHER).parent.parent
        and path.is_symlink()
    )
    command = [sys.executable, "-c", HOLDER, str(link), str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        pruned = disk.prune(cache, 0, served=KLEIN.files)
        holder.kill()

    assert names(pruned.kept) == [OTHER.revision]
    assert HubCache(cache).is_present(OTHER)
    assert names(disk.prune(cache, 0, served=KLEIN.files).removed) == [OTHER.revision]


def test_what_this_process_uses_stays_and_is_the_last_used(cache) -> None:
    """A service prunes after its load, and must not delete what that load brought."""
    for path in (cache / "converted" / OLD, cache / "compiled"):
        disk.hold(path)
    pruned = disk.prune(cache, 0)

    assert names(pruned.removed) == [NEW]
    assert set(names(pruned.kept)) == {"compiled", OLD}
    assert all(each.used_at > 1e9 for each in pruned.kept)


def test_a_use_changes_no_time_that_others_compare(cache) -> None:
    """A published file's record and the weights quantized from it name its mtime."""
    file = HubCache(cache).path(OTHER)
    disk.hold_published(file, cache)
    assert file.stat().st_mtime == 50
    assert Path(f"{file}.verified").stat().st_mtime > 1e9

    own = put(cache / "mine.safetensors", 10, 70)
    disk.hold_published(own, cache)
    assert own.stat().st_mtime == 70


def test_nothing_is_deleted_during_a_download(cache) -> None:
    """Its lock is held by whoever adds files."""
    with HubCache(cache).locked(lambda: pytest.fail("nobody else holds it")):
        pruned = disk.prune(cache, 0, served=())

    assert pruned.is_downloading
    assert not pruned.removed


def test_a_file_that_is_being_written_stays(cache) -> None:
    """One that an ended process left behind goes."""
    left = put(cache / "converted" / ".abcd_123.part", 10, 1)
    with whole_file(cache / "converted" / "encoder-int8-0123456789ab.safetensors") as file:
        file.write(b"half")
        disk.prune(cache, 0)

    assert not left.exists()
    assert (cache / "converted" / "encoder-int8-0123456789ab.safetensors").read_bytes() == b"half"


def test_links_are_not_followed(cache, tmp_path_factory) -> None:
    """Whoever may put one there cannot have files elsewhere deleted."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    precious = put(elsewhere / "precious.safetensors", 10, 1)
    (cache / "converted" / "encoder-int8-000000000000.safetensors").symlink_to(precious)
    shutil.rmtree(cache / "compiled")
    (cache / "compiled").symlink_to(elsewhere)
    disk.prune(cache, 0, served=())

    assert precious.exists()


def test_nothing_is_deleted_where_others_may_write(cache) -> None:
    """They could put a link in a folder's place, and have files elsewhere deleted."""
    (cache / "converted").chmod(0o777)
    pruned = disk.prune(cache, 0)

    assert names(pruned.removed) == ["compiled"]
    assert len(pruned.kept) == 2


FOREIGN = (
    "hub/models--black-forest-labs--FLUX.2-klein-4B/blobs/0123",
    "hub/models--black-forest-labs--FLUX.2-klein-4B/blobs/0123.part",
    f"hub/models--o--n/snapshots/{OTHER.revision}/model.safetensors",
    f"hub/someone--else/{OTHER.revision}/model.safetensors",
    f"hub/{OTHER.repository.replace('/', '--')}/notes/mine.txt",
    "compiled-by-hand/code.py",
    "converted/mine.safetensors",
    "converted/encoder-int8-mine.safetensors",
    "converted/.mine.part",
    "race-notes/a.json",
    "race.txt",
    ".compiled.old-mine/code.py",
    ".compiled.old-0123abcd9/code.py",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_klein_did_not_make_is_neither_counted_nor_deleted(cache, name) -> None:
    """Its folder could be Hugging Face's own, or hold what somebody put there."""
    before = disk.survey(cache)
    path = put(cache / name, 700, 1)
    assert disk.survey(cache) == before
    disk.prune(cache, 0, served=())

    assert path.exists()


def test_what_an_interrupted_pruning_left_goes_with_the_next(cache, monkeypatch) -> None:
    """It bears a name of its own, and is counted as what it was."""

    def stop(_) -> None:
        raise OSError(5, "Input/output error")

    for kind, served in (("compiled", None), ("published", KLEIN.files)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", stop)
            with pytest.raises(OSError, match="Input/output"):
                disk.prune(cache, 0, served=served)
        graves = [path for path in cache.rglob(".*.old-*") if path.is_dir()]
        assert len(graves) == 1
        assert graves[0] in [each.path for each in disk.survey(cache) if each.kind == kind]
        disk.prune(cache, 0, served=served)
        assert not graves[0].exists()


def test_a_download_that_was_interrupted_stays(cache) -> None:
    """What is whole in its revision stays too, else the next start fetches everything anew."""
    part = put(HubCache(cache).path(OTHER).with_name("more.safetensors.part"), 300, 50)
    pruned = disk.prune(cache, 0, served=KLEIN.files)

    assert OTHER.revision not in names((*pruned.removed, *pruned.kept))
    assert part.exists()
    assert HubCache(cache).is_present(OTHER)


@pytest.fixture
def dangling(cache) -> Path:
    """A link of a load whose published file is gone."""
    HubCache(cache).path(OTHER).unlink()
    (link,) = (
        path for path in (cache / "models" / "flux.2-klein-base-4b").rglob("*") if path.is_symlink()
    )
    return link


@pytest.mark.parametrize("place", ["models", "models/flux.2-klein-base-4b", "the folder"])
def test_links_are_not_removed_through_a_link(cache, dangling, place, tmp_path_factory) -> None:
    """Whoever put it there cannot have links elsewhere deleted."""
    moved = cache / place.replace("the folder", "models/flux.2-klein-base-4b/bf16")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere)
    target = HubCache(cache).path(OTHER)
    real = dangling.parent.resolve() / dangling.name
    real.unlink()
    real.symlink_to(target)
    assert disk.prune(cache, 0).removed

    assert real.is_symlink()


def test_links_are_not_removed_where_others_may_write(cache, dangling) -> None:
    """As with everything else."""
    folder = cache / "models" / "flux.2-klein-base-4b" / "bf16"
    folder.chmod(0o777)
    disk.prune(cache, 0)
    assert dangling.is_symlink()

    folder.chmod(0o755)
    put(cache / "converted" / NEW, 600, 300)
    disk.prune(cache, 0)
    assert not dangling.is_symlink()


def test_links_to_elsewhere_and_of_no_model_stay(cache, dangling) -> None:
    """Only klein's own links are known to be of no use."""
    foreign = dangling.with_name("foreign.safetensors")
    foreign.symlink_to(cache / "nowhere")
    unknown = cache / "models" / "mine" / "bf16" / "a.safetensors"
    unknown.parent.mkdir(parents=True)
    unknown.symlink_to(HubCache(cache).path(OTHER))
    disk.prune(cache, 0)

    assert foreign.is_symlink()
    assert unknown.is_symlink()
    assert not dangling.is_symlink()


def test_links_stay_where_nothing_else_was_removed(cache, dangling) -> None:
    """A pruning that deletes nothing changes nothing."""
    for name in ("converted", "compiled"):
        shutil.rmtree(cache / name)
    assert not disk.prune(cache, 0).removed

    assert dangling.is_symlink()


def test_a_short_exclusive_lock_does_not_lose_a_hold(cache) -> None:
    """A trial of a pruning takes one for a moment."""
    path = cache / "converted" / OLD
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, [lock])
    timer.start()
    disk.hold(path)
    timer.join()

    assert names(disk.prune(cache, 0).kept) == [OLD]
    disk.hold(path.with_name("gone"))


@pytest.fixture
def adopted(cache, tmp_path_factory) -> Path:
    """A published file that lies in Hugging Face's cache, on another disk."""
    path = HubCache(cache).path(OTHER)
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    path.rename(blob)
    path.symlink_to(blob)
    return path


def test_a_file_of_another_cache_does_not_keep_a_revision(cache, adopted) -> None:
    """Its link goes, and the file stays."""
    blob = adopted.resolve()
    pruned = disk.prune(cache, 0, served=KLEIN.files)

    assert OTHER.revision in names(pruned.removed)
    assert not adopted.is_symlink()
    assert blob.stat().st_size == 500


def test_a_file_of_another_cache_is_held_by_its_record(cache, adopted) -> None:
    """Whichever links lead to it; the file itself keeps its time."""
    (link,) = (
        path for path in (cache / "models").rglob("*") if path.resolve() == adopted.resolve()
    )
    disk.hold_published(link, cache)

    assert adopted.stat().st_mtime == 50
    assert Path(f"{adopted}.verified").stat().st_mtime > 1e9
    assert names(disk.prune(cache, 0, served=KLEIN.files).kept) == [OTHER.revision]
    disk.release()
    assert names(disk.prune(cache, 0, served=KLEIN.files).removed) == [OTHER.revision]


def test_links_in_a_circle_are_not_held(cache) -> None:
    """They end in nothing."""
    link = cache / "circle"
    link.symlink_to(link)
    disk.hold_published(link, cache)


def test_a_file_with_a_second_name_counts_nothing(cache) -> None:
    """Deleting one of its names frees no byte."""
    before = sum(each.size_bytes for each in disk.survey(cache))
    (cache / "blob").hardlink_to(HubCache(cache).path(OTHER))

    assert sum(each.size_bytes for each in disk.survey(cache)) == before - 500


def test_a_file_that_vanishes_meanwhile_takes_only_itself_off_the_list(cache, monkeypatch) -> None:
    """As a temporary file of the compiler does."""
    real = Path.lstat
    gone = put(cache / "compiled" / "ab" / "gone.py", 100, 1)
    os.utime(cache / "compiled", (200, 200))

    def lstat(path: Path) -> os.stat_result:
        if path == gone:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)

    assert disk.sums(disk.survey(cache))["compiled"] == 200
