"""Promises with seconds in them: `make test` sees that they hold, the system tests also how soon.

A machine that others use makes any of them late, so seconds are asserted in the system tests only.
"""

from __future__ import annotations

import pytest

TIMED = pytest.mark.parametrize(
    "is_timed",
    [
        pytest.param(False, id="order"),
        pytest.param(True, id="seconds", marks=pytest.mark.system),
    ],
)
"""Gives a test `is_timed`: whether it asserts seconds."""
