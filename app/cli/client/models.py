"""`klein models`: the model that the service serves, and that model with each of its adapters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from app.cli.client.service import ASKING, Service
from app.cli.console import Options, aligned, plain, tabulate

OPTIONS: Options = {**ASKING}

_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "id": lambda model: plain(model["id"]),
    "owner": lambda model: plain(model["owned_by"]),
    "adapter of": lambda model: plain(model.get("parent", "-")),
}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print them; return 0."""
    found = Service.find(arguments.url, environ).listed("/v1/models", "id", "owned_by")
    lines = aligned(tabulate(_COLUMNS, found["data"]))
    print(json.dumps(found) if arguments.json else "\n".join(lines))
    return 0
