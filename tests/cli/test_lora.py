"""`klein lora`: what is there, what comes in, what goes, and what a file is."""

from __future__ import annotations

import argparse
import json
from hashlib import sha256
from pathlib import Path

import pytest

from app.cli import lora
from app.cli.console import add_options
from app.cli.main import main
from app.engine.hub.fetch import Hub as Source
from app.errors import InvalidRequest, KleinError, StartupError
from app.settings import Settings
from tests.support.adapter_files import content, write
from tests.support.hub import Hub

KLEIN = (3072, 128)
"""[out, in] of klein's x_embedder."""
STYLE = content(shape=KLEIN)
DIGEST = sha256(STYLE).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = f"owner/styles@{COMMIT}:sub/ink.safetensors"


@pytest.fixture
def hub():
    """A hub with one adapter, and another model's."""
    files = {
        ("owner/styles", COMMIT, "sub/ink.safetensors"): STYLE,
        ("owner/styles", COMMIT, "sdxl.safetensors"): content(shape=(640, 640)),
    }
    with Hub(files) as running:
        yield running


@pytest.fixture
def klein(hub, tmp_path):
    """Run `klein lora` with klein as the model."""

    def run(*words: str, **environ: str) -> int:
        parser = argparse.ArgumentParser()
        add_options(parser, lora.OPTIONS)
        given = {"KLEIN_CACHE_DIR": str(tmp_path / "cache"), "KLEIN_DEVICE": "cpu"}
        settings = Settings.read({**given, "KLEIN_MODEL": "flux.2-klein-4b", **environ})
        source = Source(endpoint=hub.endpoint, wait=lambda seconds: None)
        return lora.run(parser.parse_args(words), settings, hub=source)

    return run


@pytest.fixture
def loras(tmp_path) -> Path:
    """The cache's own folder."""
    return tmp_path / "cache" / "loras"


def test_a_file_is_added_listed_and_removed(klein, loras, tmp_path, capsys) -> None:
    """By the name that requests will have."""
    source = write(tmp_path / "My Ink.safetensors", STYLE)
    assert klein("add", str(source)) == 0
    assert (loras / "My-Ink.safetensors").read_bytes() == STYLE
    assert "added My-Ink" in capsys.readouterr().out

    write(loras / "old.ckpt", b"")
    assert klein("list") == 0
    head, line, refused = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "rank", "bytes", "sha256"]
    assert line.split() == ["My-Ink", "4", f"{len(STYLE):,}", DIGEST]
    assert refused.startswith("not listed: old.ckpt: old.ckpt may run code")

    assert klein("remove", "My-Ink") == 0
    assert [path.name for path in loras.iterdir()] == ["old.ckpt"]
    assert klein("list") == 0
    assert "no adapter of flux.2-klein-4b" in capsys.readouterr().out


def test_a_pinned_file_of_the_hub_is_added(klein, loras, hub, capsys) -> None:
    """Once: what is there is not fetched again."""
    for _ in range(2):
        assert klein("add", ADDRESS, "--sha256", DIGEST) == 0

    assert [path.name for path in loras.iterdir()] == ["ink.safetensors"]
    assert [each.method for each in hub.seen] == ["HEAD", "GET"]
    assert "ink is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "digest", "why"),
    [
        (ADDRESS, None, "needs --sha256 with the 64 digits"),
        (ADDRESS, "ab", "needs --sha256 with the 64 digits"),
        ("owner/styles@main:ink.safetensors", DIGEST, "all 40 digits of the commit"),
        (f"owner/styles@{COMMIT}:../ink.safetensors", DIGEST, "neither a file nor a pinned"),
        (f"owner/styles@{COMMIT}:ink.bin", DIGEST, "neither a file nor a pinned"),
        ("missing.safetensors", None, "neither a file nor a pinned"),
        (f"owner/none@{COMMIT}:ink.safetensors", DIGEST, "does not say how large"),
        (ADDRESS, "0" * 64, "another SHA-256"),
        (f"owner/styles@{COMMIT}:sdxl.safetensors", None, "it is for another model"),
    ],
)
def test_what_is_not_what_was_asked_for_is_not_added(klein, loras, what, digest, why) -> None:
    """Nothing is left of it."""
    other = sha256(content(shape=(640, 640))).hexdigest()
    words = ["--sha256", digest or other] if digest or "sdxl" in what else []

    with pytest.raises(KleinError, match=why):
        klein("add", what, *words)

    assert not loras.exists() or not list(loras.iterdir())


def test_a_file_that_is_too_large_is_not_fetched(klein, hub, monkeypatch) -> None:
    """The size that the hub tells has a limit."""
    monkeypatch.setattr(lora, "MAX_BYTES", 10)

    with pytest.raises(StartupError, match="may have 10"):
        klein("add", ADDRESS, "--sha256", DIGEST)
    assert [each.method for each in hub.seen] == ["HEAD"]


def test_nothing_is_replaced(klein, loras, tmp_path) -> None:
    """Another name can be given, but neither a model's nor a path."""
    source = str(write(tmp_path / "ink.safetensors", STYLE))
    klein("add", source)
    for name, why in (
        ("ink", "There is an adapter ink"),
        ("shapes", "is the name of a model"),
        ("../ink", "--name takes"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            klein("add", source, "--name", name)

    assert klein("add", source, "--name", "ink2", "--sha256", DIGEST) == 0
    assert sorted(path.name for path in loras.iterdir()) == ["ink.safetensors", "ink2.safetensors"]


@pytest.mark.parametrize(
    ("data", "digest", "why"),
    [(b"PK", "", "no whole safetensors"), (STYLE, "0" * 64, "not the one given")],
)
def test_a_file_is_checked_before_it_is_copied(klein, loras, tmp_path, data, digest, why) -> None:
    """Also by a hash, where one is given."""
    source = write(tmp_path / "ink.safetensors", data)

    with pytest.raises(InvalidRequest, match=why):
        klein("add", str(source), *(["--sha256", digest] if digest else []))
    assert not list(loras.iterdir())


@pytest.mark.parametrize("words", [("add", "x.safetensors"), ("remove", "ink")])
def test_another_folder_is_only_read(klein, tmp_path, words) -> None:
    """It may be ComfyUI's."""
    theirs = write(tmp_path / "comfy" / "ink.safetensors", STYLE).parent

    with pytest.raises(StartupError, match="klein only reads"):
        klein(*words, KLEIN_LORA_DIR=str(theirs))
    assert klein("list", KLEIN_LORA_DIR=str(theirs)) == 0
    assert (theirs / "ink.safetensors").exists()


def test_only_a_name_is_removed(klein, loras, tmp_path) -> None:
    """A path is none; of a link, the link goes."""
    target = write(tmp_path / "ink.safetensors", STYLE)
    loras.mkdir(parents=True)
    (loras / "link.safetensors").symlink_to(target)
    for name in ("../../ink", "ink.safetensors", str(target)):
        with pytest.raises(InvalidRequest, match="There is no adapter"):
            klein("remove", name)

    assert klein("remove", "link") == 0
    assert target.exists()


def test_a_file_is_described(klein, tmp_path, capsys) -> None:
    """What it is, who writes such keys, and what it is called."""
    path = write(tmp_path / "My Ink.safetensors", STYLE)
    assert klein("check", str(path)) == 0

    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told == {
        "file": f"My Ink.safetensors, {len(STYLE):,} bytes",
        "sha256": DIGEST,
        "kind": "LoRA for flux.2-klein-4b",
        "keys": "of diffusers: transformer.x_embedder.lora_A.weight",
        "rank": "4",
        "layers": "1 of 109",
        "name": "My-Ink",
    }


def test_a_file_that_cannot_be_used_is_told_why(klein, tmp_path, capsys) -> None:
    """With exit code 1; one that is not there is an error."""
    path = write(tmp_path / "x.safetensors", content(shape=(640, 640)))

    assert klein("check", str(path)) == 1
    assert "x.safetensors cannot be used as an adapter: it is for" in capsys.readouterr().out
    with pytest.raises(InvalidRequest, match="cannot be read"):
        klein("check", str(tmp_path / "none"))


def test_words_that_miss_are_told(klein) -> None:
    """One too many, and one too few."""
    for words in (("list", "x"), ("check",)):
        with pytest.raises(InvalidRequest, match="takes nothing more"):
            klein(*words)


def test_the_command_is_registered(tmp_path, monkeypatch, capsys) -> None:
    """Under its name, with the options of others."""
    monkeypatch.setenv("KLEIN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KLEIN_DEVICE", "cpu")

    assert main(["lora", "list", "--model", "flux.2-klein-4b"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/loras: no adapter of flux.2-klein-4b\n"


def test_programs_get_one_document(klein, loras, tmp_path, capsys) -> None:
    """`--json`, whatever is done."""
    source = str(write(tmp_path / "ink.safetensors", STYLE))
    write(loras / "old.ckpt", b"")
    found = {}
    for words in (["add", source], ["list"], ["check", source], ["remove", "ink"]):
        assert klein(*words, "--json") == 0
        found[words[0]] = json.loads(capsys.readouterr().out)

    assert found["add"] == found["remove"] == {"name": "ink"}
    assert found["list"]["folder"] == str(loras)
    assert [each["sha256"] for each in found["list"]["data"]] == [DIGEST]
    assert [each["file"] for each in found["list"]["refused"]] == ["old.ckpt"]
    assert (found["check"]["is_usable"], found["check"]["sha256"]) == (True, DIGEST)
    assert klein("check", str(loras / "old.ckpt"), "--json") == 1
    assert json.loads(capsys.readouterr().out)["is_usable"] is False
