"""One measured row: what every phase writes down, and the table of them."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how large: *is_tiny* for a rehearsal without a card."""

    folder: Path
    cache: Path
    out: Path
    is_tiny: bool
    plans: tuple[str, ...] = ()
    precision: str = "fp8"
    attention: str = "auto"
    cycles: int = 30
    """How many times the worker sleeps and wakes."""

    @property
    def device(self) -> int | None:
        """The card, or None for the processor."""
        return 0 if torch.cuda.is_available() else None

    @property
    def side(self) -> int:
        """The side of the picture that the bar speaks of."""
        return 128 if self.is_tiny else 1024

    @property
    def repeats(self) -> int:
        """How many pictures a median is taken of."""
        return 3 if self.is_tiny else 20

    def count(self) -> int:
        """The number of rows written so far."""
        return len(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Read all rows."""
        if not self.out.is_file():
            return []
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def write(self, name: str, seconds: list[float], **facts: Any) -> dict[str, Any]:
        """Append a row and show it."""
        ordered = sorted(seconds)
        row = {
            "name": name,
            "card": card_name(),
            "host": host_name(),
            "steps": 4,
            "seconds_median": round(statistics.median(ordered), 5),
            "seconds_p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 5),
            "count": len(ordered),
            **facts,
            "is_tiny": self.is_tiny,
            "commit": _commit(),
            "versions": {each: version(each) for each in ("torch", "diffusers", "transformers")},
            "cuda": torch.version.cuda,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: row[key] for key in row if key not in _DULL}), flush=True)
        return row


_DULL = ("card", "host", "commit", "versions", "cuda", "date", "is_tiny", "count")


def card_name() -> str:
    """NVML's name of the card, or cpu."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def host_name() -> str:
    """The host's processor and how many cores of it this process may use."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} x {found[1] if found else platform.machine()}"


def used_bytes() -> int | None:
    """What the card says is in use, by everyone."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def sha256(pixels: bytes | bytearray | memoryview) -> str:
    """The pixels' fingerprint."""
    return hashlib.sha256(pixels).hexdigest()


def print_table(rows: list[dict[str, Any]]) -> None:
    """Show rows as a table for people."""
    columns = ("name", "width", "height", "precision", "plan", "seconds_median", "seconds_p95")
    print("\n| " + " | ".join(columns) + " | reserved GB | note |")
    print("|" + "---|" * (len(columns) + 2))
    for row in rows:
        reserved = row.get("peak_reserved_bytes")
        cells = [str(row.get(column, "")) for column in columns]
        cells.append(f"{reserved / 1e9:.2f}" if reserved else "")
        print("| " + " | ".join([*cells, str(row.get("note", ""))]) + " |")
    print(flush=True)


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
