"""Files' syntax trees, each parsed once, for tests that hold what may stand in a source."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of the file at *path*, the same for all who ask: not to be changed."""
    return ast.parse(path.read_text())
