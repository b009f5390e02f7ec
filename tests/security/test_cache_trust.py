"""A cache that others may write to: nothing that they leave there is believed, and nothing is
fetched that is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from app.engine.hub import trust
from app.engine.hub.cache import HubCache
from app.engine.hub.fetch import hash_file, partial_path
from tests.engine.hub import CONFIG, ENCODER, SINGLE, VARIANT, Downloads, content
from tests.support.hub import Hub
from tests.support.owners import OTHER, give_away
from tests.support.owners import owners as owners

FILES = (*VARIANT.shared, VARIANT.transformers["fp8"])


@pytest.fixture
def hub():
    files = {(file.repository, file.revision, file.path): content(file.path) for file in FILES}
    with Hub(files) as running:
        yield running


@pytest.fixture
def downloads(hub, tmp_path):
    return Downloads(hub, tmp_path / "cache")


@pytest.fixture
def hashed(monkeypatch):
    """The names of all files that are hashed."""
    seen: list[str] = []

    def watch(path, *more):
        seen.append(path.name)
        return hash_file(path, *more)

    monkeypatch.setattr("app.engine.hub.cache.hash_file", watch)
    return seen


def place(downloads: Downloads, path: str) -> Path:
    """Where the published file *path* lies."""
    (file,) = [file for file in FILES if file.path == path]
    return HubCache(downloads.cache).path(file)


def mark(path: Path) -> Path:
    """The record beside it."""
    return path.with_name(path.name + ".verified")


def write_as_before(cache: Path) -> None:
    """A cache as the version before wrote it: files, marks without an inode, links."""
    for file in FILES:
        owner = file.repository.replace("/", "--")
        target = cache / "hub" / owner / file.revision / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content(file.path))
        stat = target.stat()
        mark(target).write_text(f"{file.sha256} {stat.st_size} {stat.st_mtime_ns}\n")
        link = cache / "models" / VARIANT.spec.id / "fp8" / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))
    (cache / "hub" / ".lock").touch()


def test_a_cache_of_the_version_before_starts_with_nothing_fetched(downloads, hashed) -> None:
    """Its files are hashed once, their marks renewed; the start after that reads none of them."""
    write_as_before(downloads.cache)
    before = {path: path.read_bytes() for path in downloads.cache.rglob("*") if path.is_file()}

    folder = downloads.run()
    assert downloads.hub.seen == []
    assert sorted(hashed) == sorted(Path(each).name for each in (CONFIG, ENCODER, SINGLE))
    assert folder == downloads.cache / "models" / VARIANT.spec.id / "fp8"

    hashed.clear()
    downloads.run()
    assert (hashed, downloads.hub.seen) == ([], [])
    after = {path: path.read_bytes() for path in downloads.cache.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert all(before[path] == after[path] for path in before if path.suffix != ".verified")


def test_four_bytes_beside_a_forged_mark_reach_no_loader(downloads) -> None:
    """What was seen: a shared folder, a file of another user's and a mark that fits it."""
    downloads.cache.mkdir()
    downloads.cache.chmod(0o777)
    write_as_before(downloads.cache)
    path = place(downloads, SINGLE)
    path.write_bytes(b"evil")
    stat = path.stat()
    for inode in ("", f" {stat.st_ino}"):
        path.write_bytes(b"evil")
        stat = path.stat()
        sha256 = VARIANT.transformers["fp8"].sha256
        mark(path).write_text(f"{sha256} {stat.st_size} {stat.st_mtime_ns}{inode}\n")
        for each in (path, mark(path)):
            give_away(each)

        downloads.fails(f"{SINGLE} is damaged")
        assert not path.exists()


@pytest.mark.parametrize(
    "open_up",
    [
        lambda path: give_away(path),
        lambda path: give_away(mark(path)),
        lambda path: give_away(path.parent),
        lambda path: path.chmod(0o664),
        lambda path: mark(path).chmod(0o646),
        lambda path: path.parent.chmod(0o775),
        lambda path: path.parents[2].chmod(0o777),
        lambda path: path.parents[3].chmod(0o1777),
    ],
    ids=["file", "mark", "folder", "file g+w", "mark o+w", "folder g+w", "hub", "cache, sticky"],
)
def test_a_mark_counts_only_where_nobody_else_may_write(downloads, hashed, caplog, open_up) -> None:
    """Else the file is hashed at each start, never fetched, and the log says how to end it."""
    downloads.run()
    path = place(downloads, SINGLE)
    hashed.clear()
    downloads.hub.seen.clear()
    open_up(path)

    downloads.run()
    assert SINGLE in hashed
    hashed.clear()
    downloads.run()
    # A mark alone is renewed, and then it is ours.
    assert (SINGLE in hashed) != trust.is_closed(path, downloads.cache)
    assert downloads.hub.seen == []


def test_the_remedy_that_is_logged_works(downloads, hashed, caplog) -> None:
    """Afterwards one start hashes, and the next believes; nothing is fetched."""
    downloads.cache = downloads.cache.with_name("a cache")
    downloads.run()
    downloads.cache.chmod(0o775)
    give_away(place(downloads, SINGLE))
    (downloads.cache / "compiled").mkdir()
    downloads.hub.seen.clear()
    caplog.clear()
    downloads.run()

    (line,) = [record.getMessage() for record in caplog.records]
    assert "hashed at each start" in line
    subprocess.run(line.partition("or run: ")[2], shell=True, check=True, cwd="/")
    assert not (downloads.cache / "compiled").exists()
    for expected in (3, 0):
        hashed.clear()
        downloads.run()
        assert len(hashed) == expected
    assert downloads.hub.seen == []


def test_a_mark_is_bound_to_the_inode(downloads) -> None:
    """Other bytes of the same size under the same time, moved into the place of the right ones."""
    downloads.run()
    path = place(downloads, SINGLE)
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)

    downloads.fails(f"{SINGLE} is damaged")


def test_a_copied_cache_is_hashed_once_and_not_fetched(downloads, hashed, tmp_path) -> None:
    """After a restore from a backup, or on another machine."""
    downloads.run()
    shutil.copytree(downloads.cache, tmp_path / "copy", symlinks=True)
    downloads.cache = tmp_path / "copy"
    downloads.hub.seen.clear()
    for expected in (3, 0):
        hashed.clear()
        downloads.run()
        assert len(hashed) == expected
    assert downloads.hub.seen == []


def test_a_cache_that_root_has_filled_is_believed(downloads, hashed, monkeypatch, owners) -> None:
    """root may do anything to the service anyway."""
    downloads.run()
    hashed.clear()
    owners(0)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)

    downloads.run()
    assert hashed == []


def test_what_is_made_is_closed_whatever_the_umask(downloads) -> None:
    """Many systems give users a umask of 002, which would leave all of it open to a group."""
    before = os.umask(0)
    try:
        trust.close_umask()
        downloads.run()
    finally:
        os.umask(before)

    found = [downloads.cache, *downloads.cache.rglob("*")]
    assert [path for path in found if path.lstat().st_mode & 0o022 and not path.is_symlink()] == []


def test_nothing_is_written_through_a_planted_link(downloads, tmp_path) -> None:
    """Of a partial file, a mark or the lock: whatever they lead to stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = place(downloads, ENCODER)
    path.parent.mkdir(parents=True)
    partial_path(path).symlink_to(victim)
    mark(path).symlink_to(victim)

    downloads.run()
    assert victim.read_text() == "mine"

    lock = downloads.cache / "hub" / ".lock"
    lock.unlink()
    lock.symlink_to(victim)
    path.unlink()
    downloads.fails("KLEIN_CACHE_DIR cannot be used")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(("user", "asked"), [(OTHER, [None]), (0, ["bytes=1000000-"])])
def test_a_partial_file_of_somebody_elses_is_begun_anew(
    downloads, monkeypatch, user, asked
) -> None:
    """Who owns it could change it after it was hashed. root goes on with it: on a volume of another
    user's its own files may be of that kind, and they are hashed at each start."""
    path = place(downloads, ENCODER)
    path.parent.mkdir(parents=True)
    partial_path(path).write_bytes(content(ENCODER)[:1_000_000])
    monkeypatch.setattr(trust, "is_own", lambda path: False)
    monkeypatch.setattr(os, "geteuid", lambda: user)

    downloads.run()
    assert downloads.ranges(ENCODER) == asked
    assert path.read_bytes() == content(ENCODER)


@pytest.mark.parametrize("name", ["text_encoder/extra.safetensors", SINGLE])
def test_what_no_download_has_put_among_the_links_is_named(downloads, name) -> None:
    """A loader would read it, though it was never hashed."""
    folder = downloads.run()
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(b"evil")

    assert f"models/{VARIANT.spec.id}/fp8/{name}" in downloads.fails("is no file of a download")


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors.index.json",
        "text_encoder/._model.safetensors",
        "tokenizer/added_tokens.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/merges.txt",
        "transformer/pytorch_model.bin",
    ],
)
def test_whatever_a_loader_might_read_is_refused(downloads, name) -> None:
    """By the kinds that loaders look for, wherever it lies."""
    stray = downloads.run() / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"evil")

    assert name in downloads.fails("is no file of a download")


@pytest.mark.parametrize("name", [".DS_Store", "text_encoder/Thumbs.db", "notes.md"])
def test_a_stray_file_that_no_loader_reads_ends_no_start(downloads, name, caplog) -> None:
    """It is named in the log and left where it is."""
    stray = downloads.run() / name
    stray.write_bytes(b"left by a file manager")

    downloads.run()
    assert stray.exists()
    assert name in caplog.text


def test_where_rights_have_no_effect_only_another_folder_is_named(downloads, monkeypatch, caplog):
    """A Windows drive in WSL2 shows every file as open to all, whatever chmod is told."""
    downloads.run()
    downloads.cache.chmod(0o777)
    assert "chmod" in trust.remedy(downloads.cache)
    fstat = os.fstat

    def as_on_a_windows_drive(number: int) -> os.stat_result:
        return os.stat_result((fstat(number).st_mode | 0o777, *fstat(number)[1:]))

    monkeypatch.setattr(os, "fstat", as_on_a_windows_drive)
    downloads.run()
    assert "hashed at each start" in caplog.text
    assert "chmod" not in caplog.text
    assert "set KLEIN_CACHE_DIR to a folder of this user's own" in caplog.text
