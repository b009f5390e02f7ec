"""Writes adapter files of one layer, without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

SHAPES = {"x_embedder": (24, 12), "proj_out": (12, 24)}
"""Of a model that has no other layers."""
LONG_AGO = 1_700_000_000


def content(
    rank: int = 4,
    *,
    shape: tuple[int, int] = SHAPES["x_embedder"],
    key: str = "transformer.x_embedder",
    fill: int = 0,
    notes: dict[str, str] | None = None,
) -> bytes:
    """Return a file with A and B of one layer of *shape*, all of whose bytes are *fill*."""
    rows, columns = shape
    header: dict[str, object] = {} if notes is None else {"__metadata__": notes}
    start = 0
    for name, sides in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
        end = start + 4 * sides[0] * sides[1]
        header[f"{key}.{name}.weight"] = {
            "dtype": "F32",
            "shape": sides,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * start


def write(path: Path, data: bytes | None = None, at: float = LONG_AGO) -> Path:
    """Write an adapter, or *data*, that was last changed *at*; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content() if data is None else data)
    os.utime(path, (at, at))
    return path
