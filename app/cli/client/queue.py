"""`klein queue`: what this client waits for at the service; nobody else's jobs are told."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from app.cli.client.service import ASKING, Service
from app.cli.console import Options, aligned, plain, tabulate

OPTIONS: Options = {**ASKING}

Job = Mapping[str, Any]

_KEYS = ("id", "state", "position", "images", "images_done", "progress", "created")

_COLUMNS: dict[str, Callable[[Job], str]] = {
    "id": lambda job: plain(job["id"]),
    "state": lambda job: plain(job["state"]),
    "before it": lambda job: "-" if job["position"] is None else plain(job["position"]),
    "pictures": lambda job: f"{plain(job['images_done'])} of {plain(job['images'])}",
    "progress": lambda job: f"{float(job['progress']):.0%}",
    "since": lambda job: f"{max(0, int(time.time()) - int(job['created']))} s",
}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print them; return 0."""
    found = Service.find(arguments.url, environ).listed("/v1/jobs", *_KEYS)
    if arguments.json:
        print(json.dumps(found))
        return 0
    jobs = found["data"]
    print(
        "\n".join(aligned(tabulate(_COLUMNS, jobs))) if jobs else "No job of yours waits or runs."
    )
    if found.get("has_more"):
        print("There are more.")
    return 0
