"""Write the table of plans in docs/cards.md: what `klein doctor --card` computes for each card.

    python tools/cards_page.py

A test compares the two, so a changed planner or choice of precision asks for this tool.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.cli.doctor.plan_preview import assume, preview_plan
from app.engine import roofline
from app.engine.models.registry import files_for, find_model
from app.engine.quantization.formats import FORMATS
from app.settings import Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cards.md"
BEGIN = "<!-- Written by tools/cards_page.py. -->\n"
END = "<!-- End of what tools/cards_page.py writes. -->\n"

_HEAD = """\
| card | precision | download, GB | plan | peak, GB | largest, MP | with a reference, MP | alone |
|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The table, one row for each datasheet."""
    return _HEAD + "".join(map(_row, roofline.GPUS))


def _row(gpu: roofline.GpuDatasheet) -> str:
    entry = find_model("flux.2-klein-4b")
    settings = Settings.model_construct()
    target = assume(gpu)
    ahead = preview_plan(target, settings, entry.spec)
    alone = preview_plan(replace(target, free_bytes=gpu.memory_bytes), settings, entry.spec)
    files = files_for(entry, FORMATS[ahead.precision].file)
    assert ahead.plan
    assert alone.plan
    cells = (
        gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce "),
        ahead.precision,
        f"{sum(file.size_bytes for file in files) / 1e9:.1f}",
        str(ahead.plan.name),
        f"{ahead.plan.peak_bytes / 1e9:.1f}",
        *(f"{pixels / 1e6:.1f}" if pixels else "-" for pixels in ahead.plan.max_pixels[:2]),
        f"{alone.plan.name}, {alone.plan.peak_bytes / 1e9:.1f} GB",
    )
    return f"| {' | '.join(cells)} |\n"


def page() -> str:
    """The whole page with the table in its place."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
