"""The directory of adapters: what is found, what it is called, what is refused and why."""

from __future__ import annotations

import os
import time
from hashlib import sha256
from pathlib import Path

import pytest

from app.engine.adapters import directory as module
from app.engine.adapters.directory import Directory, Listing, find_preview, name_of
from tests.support.adapter_files import LONG_AGO, SHAPES, content, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder that nobody else may write to."""
    found = tmp_path / "loras"
    found.mkdir(mode=0o755)
    return found


def look(*folders: Path, **more: object) -> Listing:
    """What is listed once everything has been read."""
    *_, found = Directory(folders, **more).look(SHAPES)  # type: ignore[arg-type]
    return found


def names(found: Listing) -> list[str]:
    """The names that are listed."""
    return [each.name for each in found.adapters]


def reason(found: Listing) -> str:
    """Why the only file that is refused is."""
    (refused,) = found.refused
    return refused.reason


def test_an_adapter_is_described(folder) -> None:
    """By its header, its bytes, and what lies beside it."""
    path = write(folder / "My style v1.2.safetensors", content(rank=8))
    (folder / "My style v1.2.preview.webp").write_bytes(b"")

    (found,) = look(folder).adapters

    assert (found.name, found.rank, found.created) == ("My-style-v1.2", 8, LONG_AGO)
    assert (found.size_bytes, found.preview) == (len(content(rank=8)), True)
    assert found.sha256 == sha256(content(rank=8)).hexdigest()
    assert found.path == str(path)
    assert str(folder) not in repr(found)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.safetensors", "a"),
        ("A b (klein).SAFETENSORS", "A-b-klein"),
        ("..b,c:0.5.safetensors", "b-c-0.5"),
        ("Müller.safetensors", "Muller"),
        ("水彩.safetensors", "lora-22c08846"),
        ("<lora:x:1>.safetensors", "lora-x-1"),
        ("a" * 250, "a" * 100),
    ],
)
def test_a_name_is_a_key_and_no_path(file: str, name: str) -> None:
    """It holds nothing that separates names, scales or folders."""
    assert name_of(file) == name
    assert name_of(name) == name


def test_a_missing_folder_holds_nothing(tmp_path) -> None:
    """Nor is it made."""
    assert look(tmp_path / "none") == Listing()
    assert not (tmp_path / "none").exists()


def test_subfolders_count_and_hidden_files_do_not(folder) -> None:
    """As in ComfyUI's folder."""
    write(folder / "klein" / "deep" / "a.safetensors")
    write(folder / ".part.safetensors")
    write(folder / "notes.txt", b"")

    assert names(look(folder)) == ["a"]


def test_files_of_one_name_are_told_apart_by_their_folders(folder) -> None:
    """The one at the top keeps it; names that are equal even so are refused."""
    for path in ("a", "x/a", "y/a", "x-a"):
        write(folder / f"{path}.safetensors")

    found = look(folder)

    assert {each.name: Path(each.path).relative_to(folder) for each in found.adapters} == {
        "a": Path("a.safetensors"),
        "x-a": Path("x-a.safetensors"),
        "y-a": Path("y/a.safetensors"),
    }
    assert "would be called x-a, as x-a.safetensors is; rename it" in reason(found)


def test_the_first_folder_wins_a_name(folder, tmp_path) -> None:
    """So one's own adapter replaces that of the package."""
    mine = write(folder / "outline.safetensors")
    write(tmp_path / "package" / "outline.safetensors")

    found = look(folder, tmp_path / "package")

    assert [each.path for each in found.adapters] == [str(mine)]
    assert len(found.refused) == 1


@pytest.mark.parametrize("name", ["FLUX.2-klein-4B", "shapes", "gpt-image-1", "dall-e-mine"])
def test_a_model_keeps_its_name(folder, name) -> None:
    """A request that names it would mean either."""
    write(folder / f"{name}.safetensors")

    found = look(folder)

    assert not found.adapters
    assert "as a model is; rename it" in reason(found)


def test_a_file_that_does_not_fit_is_refused_unread(folder, monkeypatch) -> None:
    """By its header: gigabytes of another model's are not hashed."""
    monkeypatch.setattr(module, "hash_file", None)
    write(folder / "sdxl.safetensors", content(shape=(640, 640)))

    assert "it is for another model: x_embedder is" in reason(look(folder))


@pytest.mark.parametrize(
    ("file", "data", "why"),
    [
        ("a.safetensors", b"PK", "it is no whole safetensors file"),
        ("a.safetensors", content()[:-1], "it ends before its last tensor"),
        ("a.safetensors", content(key="text_encoder.x"), "layers of a text encoder"),
        ("a.ckpt", b"\x80", "may run code when it is read"),
        ("a\x1b[2J\n.pt", b"", "a?[2J?.pt may run code"),
    ],
)
def test_what_is_no_adapter_is_refused_in_words(folder, file, data, why) -> None:
    """Fit for a terminal, whatever the file is called."""
    write(folder / file, data)

    assert why in reason(look(folder))
    assert reason(look(folder)).isprintable()


def test_a_header_that_would_hold_up_the_process_is_not_parsed(folder, monkeypatch) -> None:
    """Though the format allows it."""
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 300)
    write(folder / "a.safetensors", content(notes={"tags": "x" * 300}))

    assert "its header has more than" in reason(look(folder))


def test_a_pipe_holds_up_nothing(folder) -> None:
    """To open it would wait for a writer."""
    os.mkfifo(folder / "a.safetensors")

    assert reason(look(folder)) == "a.safetensors is no regular file."


def test_a_file_that_cannot_be_read_is_tried_again(folder, monkeypatch) -> None:
    """Its rights may change, which nothing else tells."""
    write(folder / "a.safetensors")
    directory = Directory([folder])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_layout", refuse)
        *_, found = directory.look(SHAPES)
    assert reason(found) == "a.safetensors cannot be read (Permission denied)."

    *_, found = directory.look(SHAPES)
    assert names(found) == ["a"]


def test_links_that_stay_inside_are_followed(folder) -> None:
    """And folders that contain themselves end."""
    write(folder / "store" / "a.safetensors")
    (folder / "b.safetensors").symlink_to("store/a.safetensors")
    (folder / "round").symlink_to(folder)

    found = look(folder)

    assert names(found) == ["a", "b"]
    assert not found.refused


def test_a_link_out_counts_where_nobody_else_can_have_made_it(folder, tmp_path) -> None:
    """As those of the cache into Hugging Face's."""
    (folder / "a.safetensors").symlink_to(write(tmp_path / "hub" / "x.safetensors"))
    (folder / "more").symlink_to(tmp_path / "hub")
    assert names(look(folder)) == ["a", "x"]

    folder.chmod(0o777)
    found = look(folder)

    assert not found.adapters
    assert all("link out of the folder that others may change" in r.reason for r in found.refused)


def test_a_link_that_leads_nowhere_is_refused(folder) -> None:
    """It is named, since somebody will look for it."""
    (folder / "a.safetensors").symlink_to("nowhere")

    assert "leads nowhere" in reason(look(folder))


def test_depth_and_number_have_limits(folder, monkeypatch) -> None:
    """What lies beyond is named."""
    monkeypatch.setattr(module, "MAX_DEPTH", 1)
    write(folder / "a" / "b" / "deep.safetensors")
    assert reason(look(folder)) == "b lies too deep."

    monkeypatch.setattr(module, "MAX_FILES", 2)
    for name in "xyz":
        write(folder / name / f"{name}.safetensors")
    found = look(folder)
    assert names(found) == ["x", "y"]
    assert any("was not looked at" in each.reason for each in found.refused)


def test_files_are_listed_as_they_are_done(folder) -> None:
    """Those that are wanted first; nothing is said to be whole before."""
    for name in "abc":
        write(folder / f"{name}.safetensors", content(fill=ord(name)))

    seen = [(names(each), each.is_whole) for each in Directory([folder]).look(SHAPES, ["c"])]

    assert seen == [
        ([], False),
        (["c"], False),
        (["a", "c"], False),
        (["a", "b", "c"], False),
        (["a", "b", "c"], True),
    ]


def test_an_unchanged_file_is_hashed_once(folder, monkeypatch) -> None:
    """A changed one again, and what is gone is forgotten."""
    hashed: list[str] = []
    true = module.hash_file

    def hash_file(path, on_bytes):
        hashed.append(path.name)
        return true(path, on_bytes)

    monkeypatch.setattr(module, "hash_file", hash_file)
    write(folder / "a.safetensors")
    gone = write(folder / "b.safetensors", content(fill=2))
    directory = Directory([folder])
    for _ in range(2):
        *_, first = directory.look(SHAPES)
    assert sorted(hashed) == ["a.safetensors", "b.safetensors"]

    write(folder / "a.safetensors", content(fill=1), at=LONG_AGO + 1)
    gone.unlink()
    *_, second = directory.look(SHAPES)

    assert hashed[2:] == ["a.safetensors"]
    assert names(second) == ["a"]
    assert first.adapters[0].sha256 != second.adapters[0].sha256


def test_hashes_outlive_the_process_where_nobody_else_may_write(folder, monkeypatch) -> None:
    """A ComfyUI folder's 20 GB are not read at each start."""
    record = folder.parent / "loras.json"
    folder.parent.chmod(0o755)
    write(folder / "a.safetensors")
    first = look(folder, record=record)
    record.chmod(0o644)
    with monkeypatch.context() as patch:
        patch.setattr(module, "hash_file", None)
        assert look(folder, record=record) == first

    for spoilt in ("{}", "[]", "{", '{"1:2": "ab"}', '{"1:2:3:4": 5}'):
        record.write_text(spoilt)
        assert look(folder, record=record) == first
    record.write_text(record.read_text().replace(first.adapters[0].sha256, "0" * 64))
    record.chmod(0o666)
    assert look(folder, record=record) == first


def test_a_file_that_is_being_written_waits(folder) -> None:
    """Until it has been left alone for a moment."""
    write(folder / "a.safetensors", at=time.time())

    found = look(folder)
    assert not found.adapters
    assert not found.is_whole
    assert names(look(folder, settle_s=0)) == ["a"]


def test_a_replaced_file_is_listed_as_it_was_until_it_has_been_read(folder) -> None:
    """So that one that is always on is never left out for a moment."""
    path = write(folder / "a.safetensors")
    directory = Directory([folder])
    *_, before = directory.look(SHAPES)
    write(path, content(fill=1), at=time.time())
    *_, meanwhile = directory.look(SHAPES)
    write(path, content(fill=1), at=LONG_AGO + 1)
    first, *_, after = directory.look(SHAPES)

    assert before.adapters == meanwhile.adapters == first.adapters != after.adapters
    assert [each.is_whole for each in (before, meanwhile, first, after)] == [1, 0, 0, 1]


def test_a_file_that_changes_while_it_is_hashed_is_not_listed(folder, monkeypatch) -> None:
    """Its hash would be of neither."""
    path = write(folder / "a.safetensors")

    def hash_file(path, on_bytes):
        write(path, content(fill=1), at=LONG_AGO + 1)
        return "0" * 64

    monkeypatch.setattr(module, "hash_file", hash_file)

    found = look(path.parent)
    assert not found.adapters
    assert "it is being changed" in reason(found)


def test_it_stops_within_a_file(folder, monkeypatch) -> None:
    """A file may have 4 GB."""
    write(folder / "a.safetensors")
    directory = Directory([folder])
    directory.stop()

    assert not any(each.adapters for each in directory.look(SHAPES))


def test_an_adapter_of_the_model_is_told_from_others(folder) -> None:
    """By headers alone; where that takes too long, there may be one."""
    write(folder / "other.safetensors", content(shape=(640, 640)))
    assert not Directory([folder]).holds_any(SHAPES, 10.0)
    assert Directory([folder]).holds_any(SHAPES, -1.0)

    write(folder / "a.safetensors")
    assert Directory([folder]).holds_any(SHAPES, 10.0)


def test_a_preview_is_no_way_out_of_the_folder(folder, tmp_path) -> None:
    """A link that others may have made shows nobody a picture elsewhere."""
    adapter = write(folder / "a.safetensors")
    secret = write(tmp_path / "secret.png", b"")
    assert find_preview(adapter) is None
    (folder / "a.png").symlink_to(secret)
    assert find_preview(adapter) == folder / "a.png"

    folder.chmod(0o777)
    assert find_preview(adapter) is None
