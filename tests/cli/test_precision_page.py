"""The page of precisions: its table is what the program computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.cli.doctor.plan_preview import assume, preview_plan
from app.engine.models.registry import find_spec
from app.engine.roofline import GPUS, GpuDatasheet
from app.settings import Settings

pytestmark = pytest.mark.torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "precision.md").read_text()
ROWS = re.findall(r"^\| (?:RTX|H200) .*\|$", PAGE, re.M)


def row(card: GpuDatasheet) -> str:
    """The card's line as the page writes it."""
    target = assume(card)
    ahead = preview_plan(target, Settings(), find_spec("flux.2-klein-4b"))
    times = target.race.milliseconds
    cells = [
        card.name.removeprefix("NVIDIA ").removeprefix("GeForce "),
        ahead.precision,
        ahead.attention,
        *(f"{times['linears'][key]:.0f}" if key in times["linears"] else "-" for key in KEYS),
        *(f"{times['attention'][key]:.0f}" for key in ("int8", "torch")),
        str(ahead.plan.name) if ahead.plan else "none fits",
        f"{ahead.plan.peak_bytes / 1e9:.1f}" if ahead.plan else "-",
    ]
    return f"| {' | '.join(cells)} |"


KEYS = ("int8", "fp8", "bf16")


def test_every_card_has_the_line_that_the_program_computes() -> None:
    """The choice, the parts of a step, the plan and its peak."""
    assert [row(card) for card in GPUS] == ROWS
