"""Render a benchmark's result: a table for the terminal, a Markdown page with charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from app.cli.bench.charts import lines_over_time, stage_bars
from app.cli.bench.machine import Machine, Reading
from app.cli.bench.measure import Row
from app.cli.console import aligned, tabulate
from app.domain import ModelInfo

_SHOWN_STAGES = ("text", "denoise", "decode", "encode")


@dataclass(slots=True)
class Run:
    """What one `klein bench` has measured so far; *notes* say what could not be measured."""

    machine: Machine
    date: str
    rows: list[Row] = field(default_factory=list)
    loaded: list[ModelInfo] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Return the result as the JSON document for scripts."""
        return {
            "name": "klein.bench",
            "date": self.date,
            "card": self.machine.gpu or "cpu",
            "driver": self.machine.driver,
            "machine": asdict(self.machine),
            "models": [
                {
                    "model": info.model,
                    "revision": info.revision,
                    "precision": info.precision,
                    "precision_reason": info.precision_reason,
                    "plan": info.plan,
                    "plan_reasons": list(info.plan_reasons),
                    "features": list(info.features),
                    "cuda": info.cuda,
                    "load_s": info.load_s,
                }
                for info in self.loaded
            ],
            "rows": [row.as_json() for row in self.rows],
            "notes": self.notes,
        }


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "size": lambda row: row.size,
    "steps": lambda row: str(row.spec.num_inference_steps),
    "precision": lambda row: row.info.precision,
    "plan": lambda row: row.info.plan,
    "p50 s": lambda row: f"{row.seconds['total'].p50:.3f}",
    "p95 s": lambda row: f"{row.seconds['total'].p95:.3f}",
    "allocated GB": lambda row: _gigabytes(row.peak.allocated if row.peak else None),
    "reserved GB": lambda row: _gigabytes(row.peak.reserved if row.peak else None),
    "NVML GB": lambda row: _gigabytes(row.usage.gpu_bytes),
    "host GB": lambda row: _gigabytes(row.usage.host_bytes),
    "W": lambda row: "-" if row.usage.power_watts is None else f"{row.usage.power_watts:.0f}",
    "floor s": lambda row: "-" if row.floor_s is None else f"{row.floor_s:.3f}",
    "reached": lambda row: "-" if row.reached is None else f"{row.reached:.0%}",
}


def render_table(run: Run) -> str:
    """Return the result as a table for the terminal."""
    lines = [
        f"card       {run.machine.gpu_words}",
        *(
            f"{info.precision:10} {info.model}, plan {info.plan}: {_reasons(info)}"
            for info in run.loaded
        ),
        "",
        *aligned(tabulate(_COLUMNS, run.rows)),
        "",
        *aligned(_stage_table("stage p50/p95 s", run.rows)),
        "",
        *(f"not measured: {note}" for note in run.notes),
    ]
    return "\n".join(lines).rstrip()


def write_report(run: Run, path: Path) -> list[Path]:
    """Write the page, and its charts beside it; return the paths."""
    stages, memory = (path.with_name(f"{path.stem}-{name}.svg") for name in ("stages", "memory"))
    path.parent.mkdir(parents=True, exist_ok=True)
    stages.write_text(
        stage_bars(
            {
                row.name: {stage: row.seconds[stage].p50 for stage in _SHOWN_STAGES}
                for row in run.rows
            }
        )
    )
    memory.write_text(_memory_chart(run))
    path.write_text(_page(run, stages.name, memory.name))
    return [path, stages, memory]


def _page(run: Run, stages: str, memory: str) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.machine.versions.items())
    machine = run.machine
    sections = [
        f"# klein on {machine.gpu or machine.processor}",
        f"Measured by `klein bench` on {run.date}: from being accepted to the finished PNG, one "
        "picture after the other, a new prompt each time. GB are 1e9 bytes.",
        _markdown(tabulate(_COLUMNS, run.rows)),
        _explanations(run),
        "## Stages",
        f"![median seconds by stage]({stages})",
        _markdown(_stage_table("p50 / p95 s", run.rows)),
        "## Memory",
        f"![memory over time]({memory})",
        "## Machine",
        "\n".join(
            [
                f"- card: {machine.gpu_words}",
                f"- processor: {machine.processor}, {machine.host_bytes / 1e9:.0f} GB of memory",
                f"- system: {machine.system}",
                f"- versions: {versions}",
                *(f"- {_loaded_words(info)}" for info in run.loaded),
            ]
        ),
        "## Data",
        f"```json\n{json.dumps(run.as_json())}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _explanations(run: Run) -> str:
    lines = [
        "- *allocated* and *reserved*: the most that torch's tensors took and that torch held of "
        "the card.",
        "- *NVML*: the card's used memory, less what was in use before the start.",
        "- *host*: memory of both processes.",
        "- *floor*: the work divided by the card's datasheet rates, computed; *reached* is the "
        "floor's share of the median on the card. A dash: not known here.",
        *(f"- not measured: {note}" for note in run.notes),
    ]
    return "\n".join(lines)


def _loaded_words(info: ModelInfo) -> str:
    features = f"; {', '.join(info.features)}" if info.features else ""
    cuda = f", CUDA {info.cuda}" if info.cuda else ""
    return (
        f"{info.precision}: {info.model} ({info.revision}), torch {info.torch}{cuda}, loaded in "
        f"{info.load_s:.1f} s, plan {info.plan}: {_reasons(info)}{features}"
    )


def _reasons(info: ModelInfo) -> str:
    return "; ".join([info.precision_reason, *info.plan_reasons])


def _memory_chart(run: Run) -> str:
    curves = {"host": [(reading.at_s, reading.host_bytes / 1e9) for reading in run.readings]}
    marks = {}
    if card := [
        (reading.at_s, reading.gpu_bytes / 1e9)
        for reading in run.readings
        if reading.gpu_bytes is not None
    ]:
        curves["card"] = card
        marks = {"the card's memory": (run.machine.gpu_bytes or 0) / 1e9}
    return lines_over_time(curves, marks, unit="GB")


def _stage_table(head: str, rows: Sequence[Row]) -> list[list[str]]:
    lines = ([row.name, *(str(row.seconds[stage]) for stage in _SHOWN_STAGES)] for row in rows)
    return [[head, *_SHOWN_STAGES], *lines]


def _markdown(table: list[list[str]]) -> str:
    head, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f}"
