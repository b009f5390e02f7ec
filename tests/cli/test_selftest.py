"""`klein selftest`: what is broken does not pass, and what is written can be sent."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli import selftest
from app.cli.console import add_options
from app.cli.selftest import Made, judge
from app.domain import RawImage
from app.engine.models.registry import MODELS
from app.errors import InvalidRequest
from app.service.results import Picture
from app.settings import Settings
from app.telemetry.cards import Cards
from tests.cli.rounding import RoundingEngine
from tests.support.fake_nvml import FakeNvml
from tests.support.fakes import INFO
from tests.support.server import ROOT
from tests.support.spoilt_weights import spoil, zeroes

GOOD = np.random.default_rng(0).integers(40, 200, (16, 16, 3), np.uint8)


def made(
    pixels: np.ndarray = GOOD, latents: tuple[float, ...] = (1.0, 2.0), precision: str = "fp8"
) -> Made:
    """Two pictures: a good one, and one of *pixels* and *latents*."""
    infos = replace(INFO, precision=precision)
    pictures = [
        Picture(b"", "png", "image/png", 16, 16, 0, {"total": 1.0}, None, 5, (), each.tobytes())
        for each in (np.ones(2, np.float32), np.array(latents, np.float32))
    ]
    return Made(infos, pictures, [RawImage(16, 16, each.tobytes()) for each in (GOOD, pixels)])


def failed(tested: Made | str, reference: Made | str | None) -> list[str]:
    return [check.name for check in judge(tested, reference) if not check.passed]


@pytest.mark.parametrize(
    ("tested", "wrong"),
    [
        (made(), []),
        (made(latents=(1.0, float("nan"))), ["finite"]),
        (made(latents=(1.0, float("inf"))), ["finite"]),
        (made(GOOD // 64 + 100), ["not flat", "likeness"]),
        (made(GOOD // 120 * 255), ["not saturated", "likeness"]),
        (made(255 - GOOD), ["likeness"]),
        ("The card has no room.", ["start"]),
    ],
)
def test_each_fault_fails_its_check(tested, wrong) -> None:
    """One bad picture among good ones is enough."""
    assert failed(tested, made(precision="bf16")) == wrong


def test_eight_bit_without_a_reference_fails() -> None:
    """With the reason in the figure; what is served in bf16 needs none."""
    assert failed(made(), "bf16: no room") == ["likeness"]
    assert judge(made(), "bf16: no room")[-1].figure == "bf16: no room"
    assert failed(made(precision="bf16"), None) == []


def run(tmp_path: Path, *words: str) -> int:
    """Run the command on an engine whose pictures have one colour each."""
    parser = argparse.ArgumentParser()
    add_options(parser, selftest.OPTIONS)
    return selftest.run(
        parser.parse_args(["-o", str(tmp_path / "sheet.png"), *words]),
        Settings(model="shapes"),
        make_engine=RoundingEngine,
        cards=Cards(load_nvml=FakeNvml, environ={}),
    )


@pytest.mark.torch
def test_flat_pictures_fail_and_are_written_down(tmp_path, capsys) -> None:
    """Each check with its figure, the sheet, the report, and what to do with them."""
    assert run(tmp_path, "--size", "128x128") == 1

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        *("passed", "passed", "FAILED", "passed", "passed", "passed")
    ]
    assert "fp8 against bf16" in lines[4]
    assert "attach" in lines[6]
    report = json.loads((tmp_path / "sheet.json").read_text())
    assert report["passed"] is False
    assert [each["precision"] for each in report["workers"]] == ["fp8", "bf16"]
    assert min(report["psnr_db"]) > 40
    assert run(tmp_path, "--size", "128x128", "--json") == 1
    assert json.loads(capsys.readouterr().out)["checks"] == report["checks"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 4 * (128 + 8) - 8
        assert sheet.height > 2 * 128


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path) -> None:
    """Neither the sheet nor the report."""
    (tmp_path / "sheet.json").mkdir()
    with pytest.raises(InvalidRequest, match="is a folder"):
        run(tmp_path)
    with pytest.raises(InvalidRequest, match=r"\.png"):
        run(tmp_path, "-o", str(tmp_path / "sheet.jpg"))


def times(factor: float) -> Callable[..., object]:
    """Damage that leaves the weights numbers."""
    return lambda weights: weights * factor if weights.is_floating_point() else weights


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (None, set()),
        (zeroes, {"start"}),
        (times(3), {"not saturated"}),
        (times(0.7), {"not flat"}),
    ],
)
def test_it_works_on_the_demo_without_a_card(tmp_path, damage, wrong) -> None:
    """fp8, emulated, against fp32; a spoilt decoder fails its check and ends with 1."""
    model = Path(shutil.copytree(MODELS["shapes"].folder, tmp_path / "model"))
    if damage is not None:
        spoil(model, "vae", damage)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KLEIN_")}
    done = subprocess.run(
        [sys.executable, "-m", "app", "selftest", "--size", "128x128", "-o", tmp_path / "a.png"],
        cwd=ROOT,
        env=environ
        | {
            "KLEIN_DEVICE": "cpu",
            "KLEIN_MODEL": str(model),
            "KLEIN_VARIANT": "shapes",
            "KLEIN_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    report = json.loads((tmp_path / "a.json").read_text())
    found = {check["name"] for check in report["checks"] if not check["passed"]}

    assert found >= wrong if wrong else not found, done.stdout + done.stderr
    assert done.returncode == (1 if wrong else 0)
    assert (tmp_path / "a.png").exists() == ("start" not in wrong)
    assert str(tmp_path) not in json.dumps(report)
