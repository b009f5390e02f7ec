"""README.md: its figures are those that were measured, and its refusals what the program says."""

from __future__ import annotations

import json
import re

import pytest

from tests.docs import sentences

README = (sentences.ROOT / "README.md").read_text()
RESULTS = (sentences.ROOT / "benchmarks" / "RESULTS.md").read_text()
ROWS = [
    json.loads(line)
    for line in (sentences.ROOT / "benchmarks" / "results.jsonl").read_text().splitlines()
]


def cells(text: str) -> list[list[str]]:
    """The rows of the first table of *text*, without its head."""
    lines = re.search(r"(^\|.*\n)+", text, re.M)[0].splitlines()  # type: ignore[index]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def section(page: str, heading: str) -> str:
    """From *heading* to the next of its rank."""
    rank = heading.partition(" ")[0]
    return page.partition(f"\n{heading}\n")[2].partition(f"\n{rank} ")[0]


BESIDE = section(README, "## Beside ComfyUI and diffusers")


def test_the_figures_beside_comfyui_are_the_results() -> None:
    """Those of the one comparison that was made; each of its numbers is in the first page's row."""
    measured = cells(section(RESULTS, "### 26 November 2026, one H100 80 GB"))
    shown = [row for row in cells(BESIDE) if "diffusers" not in row[0]]

    assert [row[1:] for row in shown] == [[row[1], row[3], row[4]] for row in measured]
    assert [row[0].split(",")[0] for row in measured][1:] == [
        re.search(r"[\d.]+ GiB", row[0])[0]
        for row in shown[1:]  # type: ignore[index]
    ]


@pytest.mark.parametrize(("place", "name"), [(3, "diffusers.bf16"), (4, "diffusers.offload")])
def test_the_figures_beside_diffusers_are_one_runs(place: int, name: str) -> None:
    """Rows of one commit, of its card, torch and diffusers, at 1024x1024 in four steps."""
    (commit,) = re.findall(r"commit `(\w+)`, peak that torch reserved", BESIDE)
    theirs, ours = (
        next(
            row
            for row in ROWS
            if (row["name"], row["commit"], row.get("width")) == (kind, commit, 1024)
            and row.get("note", "a new prompt each") == "a new prompt each"
        )
        for kind in (name, "klein.http")
    )
    reserved = [f"{row['peak_reserved_bytes'] / 1e9:.2f}" for row in (theirs, ours)]

    assert cells(BESIDE)[place][1:] == [
        f"{theirs['seconds_median']:.3g} s",
        f"{ours['seconds_median']:.3f} s",
        f"{' / '.join(reserved)} GB",
    ]
    assert {row["steps"] for row in (theirs, ours)} == {4}
    assert theirs["card"] == ours["card"] == "NVIDIA H200"
    assert f"diffusers {theirs['versions']['diffusers']}" in BESIDE
    assert f"torch {theirs['versions']['torch']}, commit" in BESIDE


def test_the_figure_of_today_is_that_of_the_last_rows() -> None:
    """The quickest and slowest round of the newest commit that was asked at this size."""
    found = re.search(
        r"([\d.]+) to ([\d.]+) s on an H100 \(commit `(\w+)`, torch ([\d.]+)\)", BESIDE
    )
    assert found
    rounds = [
        row
        for row in ROWS
        if (row["name"], row["commit"], row.get("width")) == ("klein.pair", found[3], 1024)
        and row["note"].startswith("a new prompt each")
    ]
    seconds = [row["seconds_median"] for row in rounds]

    assert [f"{min(seconds):.3f}", f"{max(seconds):.3f}"] == [found[1], found[2]]
    assert {row["versions"]["torch"] for row in rounds} == {found[4]}
    assert all("H100" in row["card"] for row in rounds)


@pytest.mark.parametrize(
    "row", cells(section(README, "## What it refuses")), ids=lambda row: row[0]
)
def test_what_it_refuses_it_refuses_so(row: list[str]) -> None:
    """The sentence is the program's, with its values in italics."""
    assert sentences.is_printed(row[1])


def test_what_every_first_page_needs_is_on_it() -> None:
    """The picture, the two commands, and few enough lines for a minute."""
    assert (sentences.ROOT / "docs" / "playground.png").is_file()
    assert "(docs/playground.png)" in README
    assert README.index("\nmake serve ") < README.index("\ncurl ") < README.index("\n## ")
    assert len(README.splitlines()) <= 140
