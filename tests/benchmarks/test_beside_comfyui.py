"""The comparison with ComfyUI, against a server that answers as ComfyUI's does and ours with a
scripted engine.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks.comfyui import compare, workflow
from benchmarks.comfyui.ballast import ballast, fill
from benchmarks.comfyui.services import Comfy, Klein, Picture
from benchmarks.rows import Bench
from tests.support import fake_comfyui
from tests.support.server import ROOT

pytestmark = pytest.mark.torch
GIB = 1 << 30
ONE_OFF_DB = 48.13
"""10 log10(255²): each value is one less."""


def png(colour):
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def bench(tmp_path):
    """A rehearsal beside a models folder and a checkout, without weights."""
    for folder, name in workflow.FILES.items():
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / name).touch()
    (tmp_path / "checkout").mkdir()
    shutil.copy(fake_comfyui.__file__, tmp_path / "checkout" / "main.py")
    return Bench(tmp_path / "models", tmp_path / "cache", tmp_path / "rows.jsonl", is_tiny=True)


class Scripted(Klein):
    """Our service with an engine that is quick."""

    def _start(self, output):
        command = [sys.executable, "-m", "tests.support.scripted_engine"]
        return subprocess.Popen(command, cwd=ROOT, env=self.environ, stdout=output, stderr=output)


def comfy(bench, folder):
    """The server of that checkout."""
    return Comfy(folder, bench.folder.parent / "checkout", bench.folder, arguments=["--cpu"])


@pytest.mark.full
def test_both_make_the_same_pictures_and_leave_a_row_each(bench, capsys):
    """Started, asked through HTTP, compared, ended; versions and the card's memory told."""
    settings = {"model": "shapes", "device": "cpu", "cache_dir": bench.cache}
    made = []

    def keep(service):
        made.append(service)
        return service

    makers = (
        lambda folder: keep(Scripted(folder, settings)),
        lambda folder: keep(comfy(bench, folder)),
    )
    reading = itertools.chain([5_000_000_000], itertools.repeat(9_000_000_000))

    assert compare.compare(bench, makers, 1, "whole card", lambda: next(reading))

    ours, theirs = bench.rows()
    assert (ours["name"], theirs["name"]) == ("klein.http", "comfyui.http")
    for row in (ours, theirs):
        assert (row["count"], row["width"], row["note"]) == (3, 128, "beside, whole card, round 0")
        assert row["psnr_db"] == {"median": ONE_OFF_DB, "least": ONE_OFF_DB}
        assert row["nvml_peak_bytes"] == 9_000_000_000
    assert ours["nvml_bytes_before"] == 5_000_000_000
    assert {"precision", "plan", "peak_reserved_bytes"} <= set(ours)
    assert "denoise" in ours["stages"]
    assert theirs["stages"] == {"execution": 0.25}
    assert theirs["comfyui"] == {
        "version": "0.0.1",
        "torch": "2.0",
        "commit": None,
        "arguments": ["--cpu"],
    }
    assert [service._process.poll() is None for service in made] == [False, False]

    capsys.readouterr()
    compare.print_table(bench.rows())
    table = capsys.readouterr().out
    assert f"| {ours['seconds_median']:.3f} | 4.00 | 48.1, 48.1 |" in table


class Noted:
    """A service that is none, which notes when it is started and asked."""

    def __init__(self, row, log, error=None):
        self.row, self._log, self._error = row, log, error

    def __enter__(self):
        self._log.append(self.row)
        return self

    def __exit__(self, *_):
        self._log.append(f"/{self.row}")

    def ask(self, prompt, side, seed):
        if self._error:
            raise self._error
        self._log.append((prompt, seed))
        return Picture(png((1, 2, 3)), 1.0)

    def facts(self):
        return {}


def test_the_two_alternate_and_no_prompt_comes_twice(bench):
    """One has ended before the other starts; the second begins the next round."""
    log = []
    makers = [lambda _: Noted("a", log), lambda _: Noted("b", log)]

    assert compare.compare(bench, makers, 2, "whole card", lambda: None)

    starts = [each for each in log if isinstance(each, str)]
    assert starts == ["a", "/a", "b", "/b", "b", "/b", "a", "/a"]
    asked = [each for each in log if not isinstance(each, str) and "warm" not in each[0]]
    assert len(asked) == 12
    assert asked[:3] == asked[3:6]
    assert asked[6:9] == asked[9:]
    assert len({prompt for prompt, _ in asked}) == len({seed for _, seed in asked}) == 6
    assert {row["psnr_db"]["median"] for row in bench.rows()} == {compare.SAME_DB}
    assert {row["nvml_peak_bytes"] for row in bench.rows()} == {None}
    compare.print_table(bench.rows())


def test_one_that_fails_says_why_and_the_others_row_stands(bench, capsys):
    """No row without pictures, and no PSNR without two."""
    makers = [lambda _: Noted("a", []), lambda _: Noted("b", [], RuntimeError("no room"))]

    assert not compare.compare(bench, makers, 1, "7.3 GiB left", lambda: None)

    (row,) = bench.rows()
    assert (row["name"], row["psnr_db"]) == ("a", None)
    assert "b, 7.3 GiB left: RuntimeError: no room" in capsys.readouterr().err
    compare.print_table(bench.rows())


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("old", r"ComfyUI 0\.0\.1 is too old: it has no Flux2Scheduler$"),
        ("full", r"no picture, in VAEDecode: torch\.OutOfMemoryError: no room$"),
        ("models/vae/flux2-vae.safetensors", r"/prompt: 400: .*not in list: flux2-vae"),
        ("checkout/main.py", r"did not start, exit code 2:\n.*main\.py"),
    ],
)
def test_what_comfyui_says_is_told(bench, tmp_path, file, expected):
    """Too old, no room, a file that it does not find, no start; and its process has ended."""
    if "/" in file:
        (tmp_path / file).unlink()
    else:
        (tmp_path / "checkout" / file).touch()
    service = comfy(bench, tmp_path / "run")

    with pytest.raises(RuntimeError, match=f"(?s){expected}"), service:
        service.ask("a", 64, 1)

    assert service._process.poll() is not None


class MadeUp:
    """A card whose driver keeps something for itself with each piece."""

    def __init__(self, free):
        self.pieces, self._free = [], free

    def free(self):
        return self._free

    def take(self, count):
        self.pieces.append(count)
        self._free -= count + 1000


def test_the_ballast_leaves_what_was_asked():
    """In pieces of at most 1 GiB; less than a grain of 2 MiB more stays free."""
    card = MadeUp(80 * GIB)

    left = fill(card, int(11.2 * GIB))

    assert 0 <= left - int(11.2 * GIB) < 2 << 20
    assert max(card.pieces) == GIB


def test_a_card_that_has_less_is_no_smaller_card():
    """Somebody else holds it."""
    card = MadeUp(5 * GIB)
    with pytest.raises(RuntimeError, match=r"5\.00 GiB are free, less than the 7\.30"):
        fill(card, int(7.3 * GIB))
    assert not card.pieces


def test_the_ballast_is_held_by_a_process_until_the_end():
    """It has said what is free before anything else begins, and a failure ends the comparison."""
    holder = "import sys; print(round(float(sys.argv[1]) * 10), flush=True); sys.stdin.read()"
    with ballast(7.3, (sys.executable, "-c", holder)) as left:
        assert left == 73
    with (
        pytest.raises(RuntimeError, match="no ballast: exit code 3"),
        ballast(7.3, (sys.executable, "-c", "raise SystemExit(3)")),
    ):
        pytest.fail("nothing is left")


def test_psnr_of_known_pictures():
    """One off in each value, one off in one of three, equal."""
    assert compare.psnr(png((1, 2, 3)), png((2, 3, 2))) == pytest.approx(ONE_OFF_DB, abs=0.01)
    assert compare.psnr(png((1, 2, 3)), png((1, 2, 4))) == pytest.approx(52.9, abs=0.01)
    assert compare.psnr(png((1, 2, 3)), png((1, 2, 3))) == compare.SAME_DB


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--leave-gib", "11.2"), "--leave-gib needs a card"),
        (("--checkout", "/nowhere"), "there is no file /nowhere/main.py"),
        (("--models", "/nowhere"), "there is no file /nowhere/diffusion_models/flux-2-klein"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    bench, words, expected, monkeypatch, capsys
):
    """One sentence, exit code 2."""
    checkout = str(bench.folder.parent / "checkout")
    own = ["--checkout", checkout, "--models", str(bench.folder), *words]
    monkeypatch.setattr(sys, "argv", ["compare.py", *own])
    monkeypatch.setattr(Bench, "device", None)

    with pytest.raises(SystemExit, match="2"), contextlib.redirect_stdout(None):
        compare.main()

    assert expected in capsys.readouterr().err
