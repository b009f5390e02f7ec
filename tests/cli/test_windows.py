"""On Windows itself the start ends with what to do instead, before an import that fails there."""

from __future__ import annotations

import subprocess
import sys

import pytest

WINDOWS = """
import sys
sys.platform = "win32"
sys.modules |= dict.fromkeys(("fcntl", "resource", "app.errors", "app.settings"))
"""


@pytest.mark.parametrize(
    "start",
    [
        "from app.cli.main import main; main(['serve'])",
        "import runpy; runpy.run_module('app', run_name='__main__')",
    ],
    ids=["klein", "python -m app"],
)
def test_windows_is_answered_with_one_sentence(start: str) -> None:
    """It names WSL2 and Docker."""
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS + start],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("klein: Windows itself is not supported")
    assert "WSL2" in line
    assert "Docker" in line
