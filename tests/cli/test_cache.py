"""`klein cache`: what is there, what goes, and what is refused."""

from __future__ import annotations

import json

import pytest

from app.cli.main import main
from app.engine.hub.cache import HubCache
from app.engine.models.flux2_klein import KLEIN

FIRST = "encoder-int8-0123456789ab.safetensors"
SECOND = "transformer-int8-0123456789ab.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with 3,000 bytes of quantized weights."""
    folder = tmp_path / "converted"
    folder.mkdir()
    for name, size in ((FIRST, 1000), (SECOND, 2000)):
        (folder / name).write_bytes(bytes(size))
    monkeypatch.setenv("KLEIN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_it_lists_what_is_there(cache, capsys) -> None:
    """One line each, and the sums last."""
    assert main(["cache", "list"]) == 0

    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["kind", "bytes", "last", "use", "name"]
    assert sorted(line.split()[1] for line in lines) == ["1,000", "2,000"]
    assert total == f"{cache}: 3,000 bytes (quantized 3,000)"


def test_an_empty_cache_is_said_to_be_empty(tmp_path, monkeypatch, capsys) -> None:
    """Also one that does not exist, which is not made."""
    monkeypatch.setenv("KLEIN_CACHE_DIR", str(tmp_path / "none"))

    assert main(["cache", "list"]) == 0
    assert "nothing" in capsys.readouterr().out
    assert main(["cache", "prune", "--to-gb", "0"]) == 0
    assert not (tmp_path / "none").exists()


def test_it_prunes_to_the_limit_and_says_what(cache, monkeypatch, capsys) -> None:
    """By the option or the setting; a trial first."""
    assert main(["cache", "prune", "--to-gb", "0", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"would delete: {name}" for name in (f"{FIRST}, 1,000 bytes", f"{SECOND}, 2,000 bytes")),
        "would be left: 0 bytes",
    ]
    monkeypatch.setenv("KLEIN_CACHE_MAX_GB", "0.0000025")
    assert main(["cache", "prune"]) == 0
    assert "left: 2,000 bytes" in capsys.readouterr().out


def test_a_limit_that_cannot_be_reached_ends_with_1(cache, capsys) -> None:
    """What is in the way is a download."""
    folder = HubCache(cache).path(KLEIN.files[0]).parent
    folder.mkdir(parents=True)
    (folder / "a.part").write_bytes(bytes(10))

    assert main(["cache", "prune", "--to-gb", "0.000000005", "--model", "shapes", "--dry-run"]) == 1
    assert "would be left: 10 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--to-gb", "-1"], ["--to-gb", "nan"]])
def test_without_a_limit_nothing_is_deleted(cache, capsys, words) -> None:
    """The sentence says how to give one."""
    assert main(["cache", "prune", *words]) == 1
    assert "--to-gb" in capsys.readouterr().err
    assert len(list((cache / "converted").iterdir())) == 2


def test_programs_get_one_document(cache, capsys) -> None:
    """`--json`: what is there, and what goes."""
    assert main(["cache", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(cache)
    assert sorted((each["kind"], each["bytes"]) for each in found["data"]) == [
        ("quantized", 1000),
        ("quantized", 2000),
    ]

    assert main(["cache", "prune", "--to-gb", "0.000002", "--json"]) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert (pruned["dry_run"], pruned["left_bytes"] <= 2000) == (False, True)
    assert pruned["removed"]
    assert main(["cache", "list", "--json", "--cache-dir", str(cache / "none")]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == []
