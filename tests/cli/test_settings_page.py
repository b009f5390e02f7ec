"""The settings' page says what the settings class says."""

from __future__ import annotations

import runpy
from pathlib import Path

from app.settings import Settings, variable

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    """docs/settings.md is what tools/settings_page.py writes now; if not, run it."""
    tool = runpy.run_path(str(ROOT / "tools" / "settings_page.py"))

    assert tool["PAGE"].read_text() == tool["page"]()


def test_every_setting_is_on_the_page_with_its_meaning() -> None:
    """One row each, with the sentence that stands under the field."""
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `KLEIN_")}

    assert set(rows) == {variable(name) for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        assert " ".join(field.description.split()) in rows[variable(name)]
