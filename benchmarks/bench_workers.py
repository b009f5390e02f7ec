"""Several cards behind one service: throughput, starts, the same pixels, and a worker that is lost.

Each number of cards gets a service of its own, in turn, so that all are measured in one run on one
machine. Without cards several processes on the CPU stand in, to rehearse.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_http import (
    connect,
    health,
    host_bytes,
    is_ready,
    post,
    read_lines,
    serve,
    stages,
)
from benchmarks.rows import Bench, sha256

_SECONDS_TO_RETURN = 120


def measure(bench: Bench) -> None:
    """Start with one card, with two and so on, twice, and measure each."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 2
    counts = [count for count in (1, 2, 4) if count <= cards]
    with tempfile.TemporaryDirectory() as folder:
        # The first start of all fills the caches.
        with serve(bench, Path(folder) / "first", _devices(bench, 1)):
            pass
        for turn in range(2):
            for count in counts:
                _measure(bench, count, Path(folder) / f"{turn} {count}", is_last=turn == 1)


def _devices(bench: Bench, count: int) -> list[str]:
    return [f"cpu:{count}"] if bench.device is None else [str(each) for each in range(count)]


def _measure(bench: Bench, count: int, report: Path, *, is_last: bool) -> None:
    begun = time.time()
    with serve(bench, report, _devices(bench, count), count) as (service, ready_s):
        facts = {"workers": count, "width": bench.side, "height": bench.side}
        loading = host_bytes(service.pid, "VmHWM")
        pids = {line["pid"]: None for line in read_lines(report)}
        bench.write(
            "klein.workers.start",
            [ready_s],
            workers=count,
            stages=[stages(report, begun, pid) for pid in pids],
            host_peak_bytes=loading,
        )
        pictures = 4 if bench.is_tiny else 40
        _at_once(bench, 8 * count, "warm {}")
        rounds = [_at_once(bench, pictures, f"round {number} {{}}") for number in range(3)]
        bench.write(
            "klein.workers",
            [seconds / pictures for seconds, _, _ in rounds],
            **facts,
            note=f"{pictures} at once",
            drawn=[drawn for _, drawn, _ in rounds],
            precision=health()["worker"].get("precision"),
            attention=health()["worker"].get("attention"),
            host_bytes=host_bytes(service.pid, "Pss"),
        )
        if is_last:
            _same_pixels(bench, count, facts)
        if is_last and count > 1:
            _kill_one(bench, report, pictures, count, facts)


def _ask(bench: Bench, prompt: str) -> str:
    """Return the picture's fingerprint; empty where the worker that drew it was lost."""
    try:
        return sha256(_image_data(post(connect(), bench.side, prompt)[2]))
    except RuntimeError as error:
        if "process was lost" not in str(error):
            raise
        return ""


def _drawn() -> Counter[str]:
    """Return how many pictures each card has drawn so far, by the service's metrics."""
    connection = connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    drawn: Counter[str] = Counter()
    for line in text.splitlines():
        found = re.search(r'^klein_image_duration_seconds_count{.*uuid="([^"]*)".* (\S+)$', line)
        if found and 'stage="total"' in line:
            drawn[found[1]] += int(float(found[2]))
    return drawn


def _image_data(png: bytes) -> bytes:
    """The compressed pixels of a PNG without its texts, which name the card."""
    return png[png.index(b"IDAT") :]


def _at_once(bench: Bench, pictures: int, what: str) -> tuple[float, list[int], set[str]]:
    """Return the seconds that *pictures* take at once, how many each card drew, and what they are.

    A number in *what* makes each another picture.
    """
    before = _drawn()
    with ThreadPoolExecutor(pictures) as pool:
        begun = time.perf_counter()
        found = set(pool.map(lambda number: _ask(bench, what.format(number)), range(pictures)))
        seconds = time.perf_counter() - begun
    return seconds, sorted((_drawn() - before).values()), found


def _same_pixels(bench: Bench, count: int, facts: dict[str, Any]) -> None:
    """Ask for one picture so often that each card draws it."""
    asked = 8 * count
    seconds, drawn, found = _at_once(bench, asked, "the same")
    bench.write(
        "klein.workers.same",
        [seconds / asked],
        **facts,
        drawn=drawn,
        different=len(found),
        sha256=min(found),
    )


def _kill_one(bench: Bench, report: Path, pictures: int, count: int, facts: dict[str, Any]) -> None:
    """Kill a worker while they draw: how many are lost, and when it draws again."""
    pids = [line["pid"] for line in read_lines(report)]
    with ThreadPoolExecutor(pictures) as pool:
        begun = time.perf_counter()
        asked = [pool.submit(_ask, bench, f"killed {number}") for number in range(pictures)]
        while not any(each.done() for each in asked):
            time.sleep(0.01)
        os.kill(pids[-1], signal.SIGKILL)
        killed = time.perf_counter()
        lost = sum(not each.result() for each in asked)
        seconds = time.perf_counter() - begun
    while not is_ready(count):
        if time.perf_counter() - killed > _SECONDS_TO_RETURN:
            raise RuntimeError("the killed worker did not come back")
        time.sleep(0.05)
    back_s = time.perf_counter() - killed
    bench.write(
        "klein.workers.killed", [seconds / pictures], **facts, lost=lost, back_s=round(back_s, 2)
    )
