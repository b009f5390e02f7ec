"""operations.md section 7, row 12: whatever is sent to any route is answered, and the worker is the
same afterwards. The long form of tests/api/test_schema.py, with its checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.test_schema import test_whatever_is_sent_is_answered_as_documented as fuzz
from tests.server import Server


@pytest.mark.full
def test_row_12_five_thousand_cases_break_nothing(tmp_path: Path) -> None:
    """Row 12: 5,000 cases over the whole API: no 5xx, OpenAI's error object everywhere, nothing of
    the inside in any answer, and the worker's process is the one from before. The demo model's
    limits keep the pictures small, so that the time goes into requests instead of PNG."""
    with Server("slow=0", module="tests.api.live", model="shapes", device="cpu") as server:
        options = ["--phases=examples,coverage,fuzzing", "--max-examples=800", "--workers=2"]
        fuzz(server, tmp_path, 5000, options)
