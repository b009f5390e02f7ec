"""How long does the file of a finished picture take, and how large is it, beside Pillow?

The picture takes a quarter of a second to make on a fast card, so a PNG that takes as long again
would halve what the service can do for one client. The goals: 15 ms wall on two cores and 6 on
eight, and at most 1.2 times the bytes of Pillow's default, on both pictures of `tests/data`.

    python -m benchmarks.png [--runs 30]

Prints a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from app.domain import RawImage
from app.images.png import encode_png

DATA = Path(__file__).parent.parent / "tests" / "data"
METADATA = {"prompt": "a red circle on a blue background", "seed": "42"}


def main() -> None:
    """Measure both pictures."""
    parser = argparse.ArgumentParser(description="Measure the PNG encoder beside Pillow's.")
    parser.add_argument("--runs", type=int, default=30, help="runs of each of ours; Pillow gets 5")
    runs = parser.parse_args().runs
    rows = [row for name in ("smooth", "grainy") for row in measure(name, runs)]
    print(f"{'picture':8} {'encoder':18} {'median ms':>10} {'fastest ms':>10} {'bytes':>10} ratio")
    for row in rows:
        print(
            f"{row['picture']:8} {row['encoder']:18} {row['median_ms']:10.1f} "
            f"{row['fastest_ms']:10.1f} {row['bytes']:10,} {row['ratio']:.3f}"
        )
    print(json.dumps({"benchmark": "png", "cores": os.cpu_count(), "rows": rows}))


def measure(name: str, runs: int) -> list[dict[str, str | float]]:
    """Time ours on one to eight threads, and three of Pillow's levels, on one picture."""
    picture = Image.open(DATA / f"{name}.png").convert("RGB")
    image = RawImage(picture.width, picture.height, picture.tobytes())
    encoders: dict[str, tuple[Callable[[], bytes], int]] = {
        "Pillow, default": (lambda: save(picture), 5),
        "Pillow, level 1": (lambda: save(picture, compress_level=1), 5),
    }
    for threads in (1, 2, 3, 8):
        label = f"ours, {threads} thread{'s' * (threads > 1)}"
        # Ends with the process; its threads wait, as the service's do.
        helpers = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        encoders[label] = (partial(encode_png, image, METADATA, helpers), runs)
    rows: list[dict[str, str | float]] = []
    reference = len(save(picture))
    for label, (encode, times) in encoders.items():
        size, seconds = clock(encode, times)
        rows.append(
            {
                "picture": name,
                "encoder": label,
                "median_ms": round(1e3 * statistics.median(seconds), 2),
                "fastest_ms": round(1e3 * min(seconds), 2),
                "bytes": size,
                "ratio": round(size / reference, 3),
            }
        )
    return rows


def clock(encode: Callable[[], bytes], times: int) -> tuple[int, list[float]]:
    """Return the size of the file and the seconds of each run, after one that does not count."""
    size, seconds = len(encode()), []
    for _ in range(times):
        # As after a picture's time on the card, when this processor's cores are idle.
        time.sleep(0.05)
        started = time.perf_counter()
        encode()
        seconds.append(time.perf_counter() - started)
    return size, seconds


def save(picture: Image.Image, **options: int) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
