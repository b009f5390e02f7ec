"""What it costs to decode uploads in processes of their own: `python benchmarks/decoding.py`.

Each picture is prepared in a thread of this process, as was done before, and by a decoder, turn and
turn about; the medians of both and their difference in milliseconds. Then what the processes take
of memory, and what their start takes of the service's. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import sys
import time
from pathlib import Path

import psutil
from PIL import Image

from app.images.pool import DecoderPool
from app.images.preparing import Upload, prepare

DATA = Path(__file__).parent.parent / "tests" / "data"


async def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    started = time.perf_counter()
    pool = DecoderPool()
    pool.start()
    row: dict[str, float] = {"start_call_ms": _ms(started)}
    await _decode(pool, _files()["smooth.png"])
    row["first_picture_ms"] = _ms(started)
    print(f"{'picture':>14} {'bytes':>10} {'thread':>8} {'process':>8} {'more':>6}")
    for name, data in _files().items():
        thread, process = await _compare(pool, data, rounds)
        print(
            f"{name:>14} {len(data):>10,} {thread:>8.1f} {process:>8.1f} {process - thread:>6.1f}"
        )
        row[f"{name}_thread_ms"], row[f"{name}_process_ms"] = thread, process
    server = psutil.Process().children()[0]
    row["server_rss_mb"], row["server_pss_mb"] = _memory(server)
    row["decoder_rss_mb"], row["decoder_pss_mb"] = _memory(server.children()[-1])
    pool.kill()
    print(json.dumps({name: round(value, 1) for name, value in row.items()}))
    return 0


async def _compare(pool: DecoderPool, data: bytes, rounds: int) -> tuple[float, float]:
    """The medians, in a thread and in a process, in milliseconds."""
    thread: list[float] = []
    process: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        await asyncio.to_thread(prepare, [Upload(data, "image")], None, None, _as_it_is)
        thread.append(_ms(started))
        await asyncio.sleep(0.03)  # the decoder before is replaced meanwhile
        started = time.perf_counter()
        await _decode(pool, data)
        process.append(_ms(started))
    return statistics.median(thread), statistics.median(process)


async def _decode(pool: DecoderPool, data: bytes) -> None:
    await pool.prepare([Upload(data, "image")], None, None, _as_it_is, client="benchmark")


def _files() -> dict[str, bytes]:
    smooth = Image.open(DATA / "smooth.png").convert("RGB")
    large = smooth.resize((4000, 3000))
    return {
        "smooth.png": (DATA / "smooth.png").read_bytes(),
        "grainy.png": (DATA / "grainy.png").read_bytes(),
        "smooth.jpeg": _saved(smooth, "JPEG"),
        "smooth.webp": _saved(smooth, "WEBP"),
        "12 MP.jpeg": _saved(large, "JPEG"),
        "64x64.png": _saved(smooth.resize((64, 64)), "PNG"),
    }


def _saved(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=90)
    return buffer.getvalue()


def _as_it_is(width: int, height: int) -> tuple[int, int]:
    return width, height


def _memory(process: psutil.Process) -> tuple[float, float]:
    used = process.memory_full_info()
    return used.rss / 1e6, used.pss / 1e6


def _ms(since: float) -> float:
    return 1000 * (time.perf_counter() - since)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
