"""`klein compare`: the same picture at several precisions, side by side."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli import compare
from app.cli.compare import contact_sheet, psnr
from app.cli.console import add_options
from app.domain import RawImage
from app.errors import InvalidRequest, StartupError
from app.settings import Settings
from app.telemetry.cards import Cards
from app.worker.supervisor import Supervisor
from tests.cli.rounding import RoundingEngine
from tests.support.fake_nvml import FakeNvml

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *words: str) -> int:
    """Run the command on the scripted engine; the sheet goes to sheet.png."""
    parser = argparse.ArgumentParser()
    add_options(parser, compare.OPTIONS)
    return compare.run(
        parser.parse_args(["a cat", "-o", str(tmp_path / "sheet.png"), *words]),
        Settings(model="shapes"),
        make_engine=RoundingEngine,
        cards=Cards(load_nvml=FakeNvml, environ={}),
    )


def test_each_precision_is_compared_with_the_most_exact(tmp_path, capsys) -> None:
    """An error of two steps of 255 is 42.1 dB; the table and the last line say so."""
    assert run(tmp_path, "--precision", "fp8,bf16", "--size", "256x128") == 0

    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    rounded, exact = document["rows"]
    assert rounded["precision"] == "fp8"
    assert rounded["psnr_db"] == pytest.approx(42.11, abs=0.01)
    assert exact["is_reference"] is True
    assert rounded["peak_reserved_bytes"] == 7_830_000_000
    assert rounded["latent_error"] == pytest.approx(1 / 5)
    assert exact["latent_error"] is None
    assert lines[0].split()[:5] == ["precision", "plan", "PSNR", "latents", "seconds"]
    assert "42.1 dB" in lines[1]
    assert "20.00%" in lines[1]


def test_the_sheet_shows_pictures_and_differences(tmp_path, capsys) -> None:
    """Side by side in the order asked for; the difference below is eight times as strong.

    With `--json` nothing but the document is printed.
    """
    run(tmp_path, "--precision", "fp8,bf16", "--size", "256x128", "--json")

    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2

    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
        assert sheet.text["compared"] == "fp8, bf16"
    first, second = pixels[:128, :256], pixels[:128, 264:520]
    assert np.all(first - second == 2)
    assert np.all(pixels[136:264, :256] == 16)
    assert np.all(pixels[136:264, 264:520] == 0)


@pytest.mark.torch
@pytest.mark.full
def test_kernels_of_attention_are_compared_at_one_precision(tmp_path, capsys) -> None:
    """Each in a worker of its own; one for a precision that leaves no choice of a kernel."""
    words = ("--precision", "fp8,bf16", "--attention", "int8,torch", "--size", "128x128")
    assert run(tmp_path, *words) == 0

    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["precision"], row["attention"]) for row in rows] == [
        ("fp8", "int8"),
        ("fp8", "torch"),
        ("bf16", "auto"),
    ]
    assert [row["psnr_db"] for row in rows] == [pytest.approx(38.59), pytest.approx(42.11), None]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.text["compared"] == "fp8 int8, fp8 torch, bf16"


@pytest.mark.torch
def test_an_unknown_kernel_is_told_before_anything_starts(tmp_path) -> None:
    """With the names that there are."""
    with pytest.raises(InvalidRequest, match="no attention kernel; take of auto, torch, cudnn"):
        run(tmp_path, "--attention", "flash9")


def test_a_precision_that_does_not_start_leaves_the_others(tmp_path, capsys) -> None:
    """It is named with its reason, and the exit code says that something is missing."""
    assert run(tmp_path, "--precision", "int8,bf16,fp32", "--size", "128x128") == 1

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["notes"] == ["int8: The precision int8 is not available here."]
    assert [row["precision"] for row in document["rows"]] == ["bf16", "fp32"]
    assert document["rows"][0]["is_equal"] is True
    assert document["rows"][0]["psnr_db"] is None


def test_nothing_to_compare_is_an_error(tmp_path) -> None:
    """No sheet is written where not one precision gave a picture."""
    with pytest.raises(StartupError, match="nothing to compare"):
        run(tmp_path, "--precision", "int8")

    assert not (tmp_path / "sheet.png").exists()


def test_a_wrong_name_is_told_before_anything_starts(tmp_path) -> None:
    """fp4 is no precision of this service."""
    with pytest.raises(InvalidRequest, match="no precision"):
        run(tmp_path, "--precision", "fp4")


@pytest.mark.parametrize("size", ["100x100", "1024X1024", "²x3", "128x512"])
def test_a_size_that_the_model_never_makes_is_refused_before_loading(
    tmp_path, monkeypatch, size
) -> None:
    """By the rules of HTTP; the nearest that it makes is named."""

    def fail(_) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr(Supervisor, "start", fail)
    with pytest.raises(InvalidRequest, match=r"nearest valid size is [0-9]+x[0-9]+"):
        run(tmp_path, "--size", size)


def test_likeness_is_measured_in_decibels() -> None:
    """Equal pictures are infinitely alike; black and white are not alike at all."""
    black, white = (RawImage(2, 2, bytes([level]) * 12) for level in (0, 255))

    assert psnr(black, black) == math.inf
    assert psnr(black, white) == 0.0


@pytest.mark.parametrize("width", [64, 1024])
def test_every_line_under_a_picture_can_be_lettered(width) -> None:
    """Each letter has its shape, and a line that is too long is cut at the picture's edge."""
    black = RawImage(width, 32, bytes(3 * 32 * width))
    blank, first, second = (
        np.frombuffer(sheet.pixels, np.uint8).reshape(sheet.height, sheet.width, 3)[32 + 8 :]
        for words in ("", "fp8 31.2 dB 0.24 s 8.9 GB", "int8 equal 12.00 s, and so on")
        for sheet in (contact_sheet([black, black], [words, ""], None),)
    )

    assert (first != blank).any()
    assert (first[:, :width] != second[:, :width]).any()
    assert (first[:, width:] == blank[:, width:]).all()


@pytest.mark.full
@pytest.mark.torch
def test_it_works_without_a_card(tmp_path) -> None:
    """The demo model in fp32 and bf16: two workers, one after the other, one sheet."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KLEIN_")}
    sheet = tmp_path / "sheet.png"
    command = ["compare", "a red circle", "--precision", "fp32,bf16", "--model", "shapes"]
    done = subprocess.run(
        [sys.executable, "-m", "app", *command, "--size", "128x128", "-o", str(sheet)],
        cwd=ROOT,
        env=environ | {"KLEIN_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    exact, rounded = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert exact["is_reference"] is True
    assert rounded["psnr_db"] > 10
    assert 0 < rounded["latent_error"] < 1
    with Image.open(io.BytesIO(sheet.read_bytes())) as picture:
        assert picture.width == 2 * 128 + 8
