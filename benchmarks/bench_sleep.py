"""Sleep and wake over HTTP: how long each takes, and what is left on the card and on the host."""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bench_http import connect, host_bytes, post, read_lines, serve, stages
from benchmarks.rows import Bench, sha256, used_bytes


def measure(bench: Bench) -> None:
    """Let the worker sleep and wake again and again, then have twenty requests wake it."""
    before = used_bytes()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        with serve(bench, report) as (service, _):
            _cycles(bench, report, service.pid, before)
            _at_once(bench, report)


def _cycles(bench: Bench, report: Path, pid: int, before: int | None) -> None:
    wakes, sleeps, held, left, opened, asked_at = [], [], [], [], [], 0.0
    pictures = {_picture(bench)}
    for number in range(bench.cycles):
        sleeps.append(_sleep(report))
        left.append(_left(before))
        begun, asked_at = time.perf_counter(), time.time()
        pictures.add(_picture(bench))
        wakes.append(time.perf_counter() - begun)
        held.append(host_bytes(pid, "Pss_Anon") + host_bytes(pid, "Pss_Shmem"))
        opened.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        took = f"{sleeps[-1]:.2f} {wakes[-1]:.2f} {held[-1] / 1e9:.3f} GB"
        print(f"  {number}: {took}, different pictures: {len(pictures)}", flush=True)
    facts: dict[str, Any] = {"width": bench.side, "height": bench.side}
    bench.write("klein.sleep", sleeps, nvml_bytes_before=before, nvml_bytes=max(left))
    bench.write(
        "klein.wake",
        wakes,
        **facts,
        note="to the first picture's last byte",
        different=len(pictures),
        host_bytes_first=held[min(2, len(held) - 1)],
        host_bytes_last=held[-1],
        descriptors_first=opened[min(2, len(opened) - 1)],
        descriptors=opened[-1],
        stages=stages(report, asked_at, list(_pids(report))[-1]),
    )


def _at_once(bench: Bench, report: Path) -> None:
    """Twenty requests while it sleeps: how many processes were started for them."""
    _sleep(report)
    workers = len(_pids(report))
    begun = time.perf_counter()
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: post(connect(), bench.side, f"woken {number}"), range(20)))
    seconds = time.perf_counter() - begun
    loads = len(_pids(report)) - workers
    bench.write("klein.wake.twenty", [seconds], width=bench.side, height=bench.side, loads=loads)


def _left(before: int | None) -> int:
    """Return what is in use once the driver has freed all, or a second later."""
    until = time.perf_counter() + 1
    while (used := used_bytes() or 0) > (before or 0) and time.perf_counter() < until:
        time.sleep(0.02)
    return used


def _picture(bench: Bench) -> str:
    return sha256(post(connect(), bench.side, "the same")[2])


def _sleep(report: Path) -> float:
    """Return the seconds from the request until the worker's process has gone."""
    worker = list(_pids(report))[-1]
    begun = time.perf_counter()
    connection = connect()
    connection.request("POST", "/sleep")
    said = json.loads(connection.getresponse().read())
    connection.close()
    if not said["is_sleeping"]:
        raise RuntimeError(f"it does not sleep: {said}")
    while _is_alive(worker):
        time.sleep(0.01)
    return time.perf_counter() - begun


def _is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _pids(report: Path) -> dict[int, None]:
    """Return the workers' processes in the order of their starts."""
    return {line["pid"]: None for line in read_lines(report)}
