"""`klein download` says what it will do before it does it, and its exit code can be relied on."""

from __future__ import annotations

import argparse
import json
import re
import sys

import pytest

from app.cli import download
from app.cli.console import Progress, add_options
from app.cli.main import main
from app.domain import LoadProgress, WorkerStage
from app.engine.hub.fetch import Hub as Source
from app.errors import StartupError
from app.settings import Settings
from tests.cli.test_console import Terminal
from tests.engine.hub import COMMIT, ENCODER, SINGLE, VARIANT, content
from tests.support.hub import Hub

KEY = VARIANT.spec.id


@pytest.fixture
def hub():
    files = {(file.repository, COMMIT, file.path): content(file.path) for file in VARIANT.files}
    with Hub(files) as running:
        yield running


@pytest.fixture
def klein(hub, tmp_path):
    """Run the command with the small variant in the catalogue's place."""

    def run(*words: str) -> int:
        parser = argparse.ArgumentParser()
        add_options(parser, download.OPTIONS)
        given = parser.parse_args(words)
        environ = {"KLEIN_CACHE_DIR": str(tmp_path / "cache")}
        settings = Settings.read(environ, model=given.model, precision=given.precision)
        source = Source(endpoint=hub.endpoint, wait=lambda seconds: None)
        return download.run(given, settings, find=lambda key: VARIANT, hub=source)

    return run


def test_says_what_and_where_before_it_starts(klein, hub, tmp_path, capsys):
    """Files, bytes, licence, origin and place are printed before the first request."""
    hub.spoil("model_index.json", 401)

    with pytest.raises(StartupError):
        klein("--precision", "fp8")

    printed = capsys.readouterr().out
    assert "3 files, 0.00 GB, of which 0.00 GB are to be downloaded" in printed
    assert "Apache-2.0" in printed
    assert "black-forest-labs/FLUX.2-klein-4B, black-forest-labs/FLUX.2-klein-4b-fp8" in printed
    assert str(tmp_path / "cache") in printed


def test_downloads(klein, hub, tmp_path, capsys):
    """Exit code 0 means that everything is in place; the folder is printed last."""
    assert klein("--model", KEY, "--precision", "fp8") == 0

    folder = tmp_path / "cache" / "models" / KEY / "fp8"
    assert (folder / SINGLE).read_bytes() == content(SINGLE)
    assert capsys.readouterr().out.endswith(f"ready in {folder}\n")


def test_verify(klein, tmp_path, capsys):
    """`--verify` names each file with its state; anything but right makes the exit code 1."""
    assert klein("--precision", "fp8", "--verify") == 1
    assert "0 of 3 files are right." in capsys.readouterr().out

    klein("--precision", "fp8")
    assert klein("--precision", "fp8", "--verify") == 0

    path = (tmp_path / "cache" / "models" / KEY / "fp8" / ENCODER).resolve()
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert klein("--precision", "fp8", "--verify") == 1
    printed = capsys.readouterr().out
    assert f"DAMAGED, deleted  {ENCODER}" in printed
    assert "2 of 3 files are right." in printed


def test_embedded(tmp_path, capsys):
    """For the demo model there is nothing to do."""
    settings = Settings.read({}, model="shapes")

    assert download.run(argparse.Namespace(verify=False, json=False), settings) == 0
    assert "nothing to download" in capsys.readouterr().out


def test_local_model(klein, tmp_path, capsys):
    """Nor is there anything to do for a model that is the operator's own."""
    assert klein("--model", str(tmp_path)) == 0
    assert "nothing to download" in capsys.readouterr().out


@pytest.mark.torch
def test_precision_of_this_machine(klein, capsys):
    """Without a precision, the one that the service would choose here is fetched."""
    assert klein() == 0
    assert re.search(r" at (fp8|int8|bf16): 3 files", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["nonsense", "flux.2-klein-9b", "../no/such"])
def test_other_names(name, capsys):
    """A name that is not in the catalogue ends with exit code 1 and one sentence."""
    code = main(["download", "--model", name, "--precision", "fp8"])
    printed = capsys.readouterr()

    assert (code, printed.out) == (1, "")
    assert printed.err.count("\n") == 1
    assert "flux.2-klein-4b" in printed.err


def test_programs_get_one_document(klein, tmp_path, capsys):
    """`--json`: what came, what is right, and that there is nothing to do."""
    assert klein("--precision", "fp8", "--json") == 0
    came = json.loads(capsys.readouterr().out)
    assert came["folder"] == str(tmp_path / "cache" / "models" / KEY / "fp8")
    assert len(came["files"]) == 3
    assert came["downloaded_bytes"] == came["bytes"] > 0

    assert klein("--precision", "fp8", "--verify", "--json") == 0
    states = json.loads(capsys.readouterr().out)["files"]
    assert [each["state"] for each in states] == ["right"] * 3
    assert klein("--model", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"] == []


def test_speed_and_time_left_are_shown_on_a_terminal(monkeypatch):
    """The bytes of all files together are known, so the share that is done tells the speed."""
    clock = iter((0.0, 2.0, 4.0))
    monkeypatch.setattr(sys, "stderr", Terminal())
    show = Progress(lambda: next(clock))
    for share in (0.0, 0.25, 0.5):
        download._told_by(show, 80_000_000)(LoadProgress(WorkerStage.DOWNLOAD, share, "a file"))

    assert "downloading the model, a file, 10.0 MB/s, 0:04 left" in sys.stderr.getvalue()
