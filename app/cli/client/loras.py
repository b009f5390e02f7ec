"""`klein loras`: the adapters that a request to the service may name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from app.cli.client.service import ASKING, Service
from app.cli.console import Options, aligned, plain, tabulate

OPTIONS: Options = {**ASKING}

_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "name": lambda lora: plain(lora["id"]),
    "rank": lambda lora: plain(lora["rank"]),
    "bytes": lambda lora: f"{int(lora['size_bytes']):,}",
    "default": lambda lora: "-" if lora.get("scale") is None else plain(lora["scale"]),
    "sha256": lambda lora: plain(lora["sha256"])[:16],
}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print them; return 0."""
    service = Service.find(arguments.url, environ)
    found = service.listed("/v1/loras", "id", "rank", "size_bytes", "sha256")
    if arguments.json:
        print(json.dumps(found))
    elif found["data"]:
        print("\n".join(aligned(tabulate(_COLUMNS, found["data"]))))
    else:
        print("The service knows no adapter; `klein lora add` adds one.")
    return 0
