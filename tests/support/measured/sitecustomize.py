"""Measures a process that inherits no variable but Python's own, as the decoders' fork server does.

`make coverage` puts this folder on PYTHONPATH. A process that inherits coverage's own variables is
measured already, and then this changes nothing; a Python without coverage is none of ours.
"""

import contextlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

with contextlib.suppress(ImportError):
    import coverage

    os.environ.setdefault("COVERAGE_FILE", str(ROOT / ".coverage"))
    os.environ.setdefault("COVERAGE_PROCESS_START", str(ROOT / "pyproject.toml"))
    coverage.process_startup()
