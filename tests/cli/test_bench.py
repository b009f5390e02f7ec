"""`klein bench` without a card, and on one that is not there."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from app.cli.bench import command as bench
from app.cli.bench.charts import lines_over_time, stage_bars
from app.cli.console import add_options
from app.domain import ModelInfo
from app.errors import InvalidRequest
from app.settings import Settings
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory
from app.worker.supervisor import Supervisor
from tests.monitoring.carded import GPU, PEAK, CardedEngine
from tests.support.fake_nvml import FakeNvml

ROOT = Path(__file__).resolve().parents[2]


def arguments(*words: str) -> argparse.Namespace:
    """The command line as the parser reads it."""
    parser = argparse.ArgumentParser()
    add_options(parser, bench.OPTIONS)
    return parser.parse_args(words)


def measure(*words: str, make_engine: EngineFactory = CardedEngine) -> int:
    """Run the command on a scripted engine and an RTX 3060 that NVML tells of."""
    return bench.run(
        arguments(*words),
        Settings(model="shapes"),
        make_engine=make_engine,
        cards=Cards(load_nvml=FakeNvml, environ={}),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of one run on the card that is not there."""
    path = tmp_path_factory.mktemp("bench") / "report.md"
    assert measure("--sizes", "256x256,512x512", "-n", "3", "--out", str(path)) == 0
    return path


def test_the_last_line_is_one_json_document(capsys) -> None:
    """With a row for each size: seconds by stage, peaks, power, and the card's floor."""
    assert measure("--sizes", "512x512,256x256", "-n", "2") == 0

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = document["rows"]
    assert document["card"] == GPU
    assert document["driver"] == "580.65.06"
    assert (first["width"], second["width"]) == (512, 256)
    assert first["precision"] == "int8"
    assert first["images"] == 2
    assert first["peak_reserved_bytes"] == PEAK.reserved
    assert first["nvml_bytes"] == 0
    assert first["power_watts"] == 151.5
    assert first["floor_s"] == pytest.approx(0.70, abs=0.005)
    assert set(first["stages"]) >= {"text", "denoise", "decode", "encode", "total"}


def test_people_get_a_table(capsys) -> None:
    """One line for each size under a head, and the card above."""
    measure("--sizes", "512x512", "-n", "1")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"card       {GPU}")
    head = next(number for number, line in enumerate(lines) if line.startswith("size"))
    assert lines[head + 1].startswith("512x512")
    assert len(lines[head].split("  ")) > 5


def test_the_report_holds_what_someone_else_needs(report) -> None:
    """Card, driver, versions, precision and plan with reasons, numbers, and its own raw data."""
    page = report.read_text()

    for words in (GPU, "driver 580.65.06", "torch", "int8", "resident/tiled", "scripted", "floor"):
        assert words in page
    assert json.loads(page.split("```json\n")[1].split("\n```")[0])["name"] == "klein.bench"


def test_the_reports_charts_lie_beside_it(report) -> None:
    """Two SVG files that the page names, each a well-formed picture."""
    charts = sorted(report.parent.glob("*.svg"))

    assert [chart.name for chart in charts] == ["report-memory.svg", "report-stages.svg"]
    for chart in charts:
        assert f"({chart.name})" in report.read_text()
        assert ET.parse(chart).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_chart_of_nothing_is_still_a_picture() -> None:
    """A run that measured nothing ends with a report, not with a division by zero."""
    assert ET.fromstring(stage_bars({})) is not None
    assert ET.fromstring(lines_over_time({}, {}, unit="GB")) is not None


def test_names_in_charts_are_text() -> None:
    """A name with signs that mean something to XML comes out as it went in."""
    drawn = ET.fromstring(stage_bars({"a<b & c": {"text": 1.0}}))

    assert "a<b & c" in [element.text for element in drawn.iter()]


class SmallCard(CardedEngine):
    """Finds out, once loaded, that 256x256 is the most that fits beside the model."""

    def load(self, on_progress) -> ModelInfo:
        return replace(super().load(on_progress), max_pixels=(256 * 256,))


def test_a_size_that_the_card_cannot_hold_is_noted(capsys) -> None:
    """Only the loaded model can know; the other sizes are measured all the same."""
    assert measure("--sizes", "512x512,128x128", "-n", "1", make_engine=SmallCard) == 0

    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["width"] for row in document["rows"]] == [128]
    (note,) = document["notes"]
    assert note.startswith("int8 512x512: ")


@pytest.mark.parametrize(
    "size", ["100x100", "1024X1024", "²x3", "128x512", "1024x1024", "99999999x1"]
)
def test_a_size_that_the_model_never_makes_is_refused_before_loading(monkeypatch, size) -> None:
    """By the rules of HTTP; the nearest that it makes is named, and the other sizes wait too."""

    def fail(_) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr(Supervisor, "start", fail)
    with pytest.raises(InvalidRequest, match=r"nearest valid size is [0-9]+x[0-9]+"):
        measure("--sizes", f"128x128,{size}", "-n", "1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "big"], "WIDTHxHEIGHT"),
        (["--precision", "fp4"], "no precision"),
        (["-n", "0"], "at least 1"),
        (["--out", "report.pdf"], "must end in .md"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(words, says) -> None:
    """In one sentence, with what would be right."""
    with pytest.raises(InvalidRequest, match=says):
        measure(*words)


@pytest.mark.full
@pytest.mark.torch
def test_it_works_without_a_card(tmp_path) -> None:
    """The demo model on the processor: no floor, no card memory, but seconds and host memory."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KLEIN_")}
    command = ["bench", "--model", "shapes", "--sizes", "128x128", "-n", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "app", *command, "--out", str(tmp_path / "report.md")],
        cwd=ROOT,
        env=environ | {"KLEIN_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    (row,) = document["rows"]
    assert document["card"] == "cpu"
    assert row["seconds_median"] > 0
    assert row["host_bytes"] > 100_000_000
    assert row["floor_s"] is None
    assert row["nvml_bytes"] is None
    assert (tmp_path / "report-stages.svg").exists()


def test_programs_get_one_document_alone(tmp_path, capsys) -> None:
    """`--json`: no table, no path, and the report all the same."""
    path = tmp_path / "report.md"
    assert measure("--json", "--sizes", "256x256", "-n", "1", "--out", str(path)) == 0

    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1
    assert path.exists()
