"""Where Prometheus finds each replica: its file of targets, from what Ray knows of the replicas.

A scrape through Serve's proxy would be answered by one replica now and by another then. In HAProxy
mode each replica listens on a port of its own; that is what Prometheus is told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile


@dataclass(frozen=True, slots=True)
class Target:
    """One replica: the address it listens on, its name, and the node that it is on."""

    address: str
    port: int
    replica: str
    node: str


def write_document(targets: Iterable[Target]) -> str:
    """Return the JSON that Prometheus' `file_sd_configs` and `http_sd_configs` read.

    Each replica has an entry of its own, whose labels are `replica` and `node`; without replicas it
    is an empty list.
    """
    entries = [
        {
            "targets": [
                f"[{each.address}]:{each.port}"
                if ":" in each.address
                else f"{each.address}:{each.port}"
            ],
            "labels": {"replica": each.replica, "node": each.node},
        }
        for each in sorted(targets, key=lambda each: (each.node, each.port))
    ]
    return json.dumps(entries, indent=2) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Put *text* into *path* as a whole: Prometheus reads the file while it is written.

    Raises:
        OSError: it cannot be written there.
    """
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            # Prometheus is another user, as a rule.
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
