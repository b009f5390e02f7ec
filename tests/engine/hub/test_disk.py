"""What lies in the cache is listed, and pruned only where it can be made or fetched again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.hub import disk
from app.engine.hub.cache import HubCache
from app.engine.hub.disk import Kind
from app.engine.hub.trust import whole_file
from app.engine.models.flux2_klein import KLEIN, KLEIN_BASE

SERVED = KLEIN.transformers["fp8"]
OTHER = next(file for file in KLEIN_BASE.files if file not in KLEIN.files)

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
        HubCache(tmp_path).link(f"{file.repository.split('/')[1]}/fp8", [file])
    put(HubCache(tmp_path).path(SERVED).with_name("more.safetensors.part"), 300, 50)
    put(tmp_path / "converted" / "old-int8.safetensors", 400, 100)
    put(tmp_path / "converted" / "new-int8.safetensors", 600, 300)
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
    assert (used["old-int8.safetensors"], used["compiled"]) == (100, 200)
    assert {each.used_at for each in stored if each.kind is Kind.PUBLISHED} == {60}
    assert any("flux.2-klein-4b" in each.name for each in stored)


def test_derived_files_go_first_the_least_recently_used_before_others(cache) -> None:
    """Down to the limit and no further; a service deletes nothing published at all."""
    pruned = disk.prune(cache, 2600)

    assert names(pruned.removed) == ["old-int8.safetensors", "compiled"]
    assert pruned.left_bytes == 2520 == sum(each.size_bytes for each in disk.survey(cache))
    assert names(disk.prune(cache, 0).removed) == ["new-int8.safetensors"]
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
    for path in (cache / "converted" / "old-int8.safetensors", cache / "compiled"):
        disk.hold(path)
    pruned = disk.prune(cache, 0)

    assert names(pruned.removed) == ["new-int8.safetensors"]
    assert sorted(names(pruned.kept)) == ["compiled", "old-int8.safetensors"]
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
    left = put(cache / "converted" / ".left.part", 10, 1)
    with whole_file(cache / "converted" / "third.safetensors") as file:
        file.write(b"half")
        disk.prune(cache, 0)

    assert not left.exists()
    assert (cache / "converted" / "third.safetensors").read_bytes() == b"half"


def test_links_are_not_followed(cache, tmp_path_factory) -> None:
    """Whoever may put one there cannot have files elsewhere deleted."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    precious = put(elsewhere / "precious.safetensors", 10, 1)
    (cache / "converted" / "evil.safetensors").symlink_to(precious)
    (cache / "compiled-more").symlink_to(elsewhere)
    disk.prune(cache, 0, served=())

    assert precious.exists()


def test_nothing_is_deleted_where_others_may_write(cache) -> None:
    """They could put a link in a folder's place, and have files elsewhere deleted."""
    (cache / "converted").chmod(0o777)
    pruned = disk.prune(cache, 0)

    assert names(pruned.removed) == ["compiled"]
    assert len(pruned.kept) == 2
