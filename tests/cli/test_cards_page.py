"""The page of cards: computed floors are those of the program, and nothing measured is invented."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from app.cli.doctor.checks import PINNED_CUDA
from app.cli.doctor.plan_preview import OTHERS_BYTES, klein_weights
from app.engine.models.registry import files_for, find_model
from app.engine.quantization.formats import FORMATS
from app.engine.roofline import GPUS, GpuDatasheet, roofline
from app.engine.runtime.toolchain import INSTALLERS, WITHOUT_KERNELS
from app.telemetry.preflight import minimum_driver

ROOT = Path(__file__).resolve().parents[2]
PAGE, _, REST = (ROOT / "docs" / "cards.md").read_text().partition("\n## What it gets\n")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| (RTX|H200)", line)
]


def seconds(card: GpuDatasheet, precision: str) -> str:
    """The floor as the page writes it."""
    if precision == "fp8" and card.fp8 is None:
        return "-"
    found = roofline(find_model("flux.2-klein-4b").architecture, card, precision, 1024, 1024, 4)
    assert found is not None
    return f"{found.total_s:.2f}"


def test_every_card_has_its_row() -> None:
    """In the order of the table that `klein doctor --card` knows."""
    names = [card.name.removeprefix("NVIDIA ").removeprefix("GeForce ") for card in GPUS]

    assert [row[0] for row in ROWS] == names


@pytest.mark.parametrize(("card", "row"), list(zip(GPUS, ROWS, strict=True)))
def test_the_floors_are_those_that_the_program_computes(card, row) -> None:
    """Seconds for 1024x1024 in four steps at int8, fp8 and bf16."""
    assert row[3:6] == [seconds(card, precision) for precision in ("int8", "fp8", "bf16")]
    assert row[2] == ".".join(str(part) for part in card.capability)


def test_a_measured_number_comes_with_its_report() -> None:
    """What nobody has measured is called so; a number links to a report that is there."""
    for row in ROWS:
        if row[6] == "not yet measured":
            continue
        link = re.fullmatch(r"\[\d+\.\d+\]\((.+)\)", row[6])
        assert link, row
        assert (ROOT / "docs" / link[1]).resolve().is_file()


@pytest.mark.torch
def test_what_a_card_gets_is_what_the_program_computes() -> None:
    """Precision, plan, peak and sizes; if not, run the tool."""
    tool = runpy.run_path(str(ROOT / "tools" / "cards_page.py"))

    assert tool["PAGE"].read_text() == tool["page"]()
    assert tool["table"]() in REST


def test_what_is_missing_costs_what_the_program_says() -> None:
    """The floors of an RTX 3060 and the factor without our kernels, as advice gives them."""
    card = GPUS[0]

    assert card.key == "rtx-3060"
    assert f"{seconds(card, 'bf16')} s then, and not {seconds(card, 'int8')} s" in REST
    assert f"about {WITHOUT_KERNELS} times as long" in REST
    assert FORMATS["int8"].package in REST
    assert INSTALLERS["apt-get"] in REST


def test_the_readmes_needs_are_those_of_the_program() -> None:
    """Downloads by published sizes, rounded weights by the planner's, and the driver."""
    readme = (ROOT / "README.md").read_text()
    needs = readme.partition("## What it needs\n")[2].partition("\n## ")[0]
    klein = find_model("flux.2-klein-4b")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]]
        for line in needs.splitlines()
        if line.startswith("| ")
    }
    downloads = [
        sum(file.size_bytes for file in files_for(klein, FORMATS[name].file)) / 1e9
        for name in ("int8", "fp8")
    ]
    weights = klein_weights(FORMATS["int8"])
    blocks = weights.transformer - OTHERS_BYTES

    assert rows["the model's download"][:2] == [f"{each:.1f} GB" for each in downloads]
    assert rows["rounded weights, kept beside it"][:2] == [
        f"{each / 1e9:.1f} GB" for each in (blocks + weights.encoder, weights.encoder)
    ]
    times = [f"{each * 8e9 / 100e6 / 60:.0f}" for each in downloads]
    assert f"takes {times[0]} minutes in int8 and {times[1]} in fp8" in needs
    assert f"CUDA {PINNED_CUDA} ({minimum_driver(PINNED_CUDA)} or newer" in needs
