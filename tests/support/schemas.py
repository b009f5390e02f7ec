"""Files judged by the schemas that check-jsonschema ships.

In this process: a process of its own takes half a second to start, for each file.
"""

from __future__ import annotations

from pathlib import Path

from check_jsonschema import main
from click.testing import CliRunner


def faults(schema: str, *files: Path) -> str:
    """What check-jsonschema finds in *files* against its builtin *schema*; empty where nothing."""
    done = CliRunner().invoke(main, ["--builtin-schema", schema, *map(str, files)])
    return "" if done.exit_code == 0 else f"{done.output}\n{done.exception!r}"
