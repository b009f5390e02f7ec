"""The service as its users meet it: a subprocess, one client, one request in flight.

A client keeps its connection, as the common libraries do; one series makes a new one each time. The
system learns only from a connection's use how much may be under way at once, so the two megabytes
of a picture take two milliseconds longer through a new one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.rows import Bench, sha256, used_bytes

_ROOT = Path(__file__).resolve().parent.parent
PORT = 18_431
"""Where the service is measured."""
_COLD_STARTS = ("first start", "second start", "third start")


def measure(bench: Bench) -> None:
    """Start, wait until ready, warm up, and take the median of new prompts."""
    before = used_bytes()
    with tempfile.TemporaryDirectory() as folder:
        _measure(bench, before, Path(folder) / "report.jsonl")


def _measure(bench: Bench, before: int | None, report: Path) -> None:
    begun = time.time()
    with serve(bench, report) as (service, ready_s):
        print(f"  ready after {ready_s:.1f} s", flush=True)
        loading = host_bytes(service.pid, "VmHWM")
        print(f"  host memory at most {loading / 1e9:.2f} GB until ready", flush=True)
        for stage, seconds in stages(report, begun).items():
            print(f"  {seconds:6.1f} s {stage}", flush=True)
        for side, note in ((bench.side, "a new prompt each"), (bench.side // 2, "half")):
            _series(bench, side, note, before, ready_s)
        _series(bench, bench.side, "a new connection each", before, ready_s, is_kept=False)
        _series(bench, bench.side, "cache hit", before, ready_s, prompt="the same")
        _queue(bench, report)
        serving = host_bytes(service.pid, "Pss")
        print(f"  host memory {serving / 1e9:.2f} GB after serving", flush=True)


def measure_starts(bench: Bench) -> None:
    """Start and stop: seconds until ready, by stage, and the host's memory.

    Three times where the cache is empty: the first start rounds the encoder and compiles
    everything, the others find both. Each ends with the worker killed, and the seconds until a
    picture that is asked for at once has come.
    """
    is_cold = not (bench.cache / "compiled").exists()
    with tempfile.TemporaryDirectory() as folder:
        for note in _COLD_STARTS if is_cold else ("a later start",):
            _measure_start(bench, note, Path(folder) / f"{note}.jsonl")


def _measure_start(bench: Bench, note: str, report: Path) -> None:
    begun = time.time()
    with serve(bench, report) as (service, ready_s):
        loading = host_bytes(service.pid, "VmHWM")
        post(connect(), bench.side, "a picture")
        bench.write(
            "klein.start",
            [ready_s],
            note=note,
            precision=health().get("precision"),
            plan=health().get("plan"),
            stages=stages(report, begun),
            host_peak_bytes=loading,
            host_bytes=host_bytes(service.pid, "Pss"),
        )
        killed = time.time()
        os.kill(next(line["pid"] for line in read_lines(report) if "pid" in line), signal.SIGKILL)
        bench.write(
            "klein.killed",
            [_first_picture(bench.side, killed)],
            note=note,
            stages=stages(report, killed),
        )


def _first_picture(side: int, begun: float) -> float:
    """Return the seconds from *begun* until a picture has come; a killed worker fails one."""
    while True:
        try:
            post(connect(), side, "a picture after")
        except RuntimeError:
            continue
        return time.time() - begun


def stages(report: Path, begun: float, pid: int | None = None) -> dict[str, float]:
    """When each stage of a start began, of worker *pid* or any, in seconds after *begun*."""
    lines = [
        line
        for line in read_lines(report)
        if "stage" in line and line["at"] > begun and pid in (None, line["pid"])
    ]
    return {
        stage: round(next(noted)["at"] - begun, 1)
        for stage, noted in groupby(lines, itemgetter("stage"))
    }


def _series(
    bench: Bench,
    side: int,
    note: str,
    before: int | None,
    ready_s: float,
    prompt: str | None = None,
    *,
    is_kept: bool = True,
) -> None:
    connection = connect()
    for number in range(3):
        post(connection, side, prompt or f"warm {number} {note}")
    headers: dict[str, str] = {}
    seconds, timings, body = [], [], b""
    for number in range(bench.repeats):
        if not is_kept:
            connection.close()
            connection.connect()
        taken, headers, body = post(connection, side, prompt or f"picture {number} {note}")
        seconds.append(taken)
        timings.append(read_timings(headers.get("server-timing", "")))
    stages = {
        stage: round(statistics.median(each.get(stage, 0.0) for each in timings) / 1000, 5)
        for stage in sorted({stage for each in timings for stage in each})
    }
    bench.write(
        "klein.http",
        seconds,
        width=side,
        height=side,
        precision=health().get("precision"),
        attention=health().get("attention"),
        plan=health().get("plan"),
        note=note,
        stages=stages,
        ready_s=round(ready_s, 1),
        peak_reserved_bytes=int(headers.get("x-klein-peak-vram-bytes") or 0) or None,
        nvml_bytes=used_bytes(),
        nvml_bytes_before=before,
        seed=1,
        sha256=sha256(body),
        body_bytes=len(body),
    )


def _queue(bench: Bench, report: Path) -> None:
    """Twenty jobs at once: seconds per picture, and how long the card idles between two."""
    from concurrent.futures import ThreadPoolExecutor

    count = 4 if bench.is_tiny else 20
    seen = len(read_lines(report))
    begun = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: post(connect(), bench.side, f"queued {number}"), range(count)))
    each = (time.perf_counter() - begun) / count
    # The first of them follows a picture that nobody waited behind.
    idle = [line["idle_ms"] for line in read_lines(report)[seen + 1 :]]
    bench.write(
        "klein.http",
        [each],
        width=bench.side,
        height=bench.side,
        note=f"{count} waiting",
        card_idle_ms_median=statistics.median(idle),
        card_idle_ms_max=max(idle),
    )


def read_lines(report: Path) -> list[dict[str, Any]]:
    """Read what the timed service has written."""
    return [json.loads(line) for line in report.read_text().splitlines()]


def connect() -> http.client.HTTPConnection:
    """Open a connection to the service."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    connection.connect()
    return connection


def post(
    connection: http.client.HTTPConnection, side: int, prompt: str
) -> tuple[float, dict[str, str], bytes]:
    """Return seconds from the first byte sent to the last byte read, headers and body."""
    asked = {"prompt": prompt, "width": side, "height": side, "num_inference_steps": 4, "seed": 1}
    begun = time.perf_counter()
    connection.request("POST", "/generate", json.dumps(asked), {"content-type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    taken = time.perf_counter() - begun
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body[:300]!r}")
    return taken, {key.lower(): value for key, value in answer.getheaders()}, body


def read_timings(header: str) -> dict[str, float]:
    """Read Server-Timing: milliseconds by stage."""
    return {name: float(value) for name, value in re.findall(r"([\w-]+);dur=([\d.]+)", header)}


def host_bytes(pid: int, entry: str) -> int:
    """Host memory of process *pid* and all that came from it, an *entry* of the kernel's.

    VmHWM is what each held at most, where shared pages count for each; of Pss they count once. The
    pages of files count for less while another process has them too; Pss_Anon and Pss_Shmem leave
    them out.
    """
    kilobytes = 0
    file = "smaps_rollup" if entry.startswith("Pss") else "status"
    with contextlib.suppress(OSError):  # It may end meanwhile.
        found = re.search(rf"^{entry}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.M)
        kilobytes = int(found[1]) if found else 0
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            kilobytes += host_bytes(int(child), entry) // 1024
    return 1024 * kilobytes


def health() -> dict[str, Any]:
    """What `/health` says, with what it says of the worker."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
    connection.request("GET", "/health")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    inner = found.get("worker") or found.get("model_info") or {}
    return found | inner if isinstance(inner, dict) else found


def settings(bench: Bench, device: str) -> dict[str, str]:
    """The service's settings as environment variables, to be measured on *device*."""
    return {
        "KLEIN_MODEL": str(bench.folder),
        "KLEIN_CACHE_DIR": str(bench.cache),
        "KLEIN_PORT": str(PORT),
        "KLEIN_PRECISION": bench.precision,
        "KLEIN_ATTENTION": bench.attention,
        "KLEIN_LOG_LEVEL": "warning",
        "KLEIN_QUEUE_IMAGES": "64",
        "KLEIN_DEVICE": device,
    }


@contextlib.contextmanager
def serve(
    bench: Bench, report: Path, devices: Sequence[str] = (), workers: int = 1
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Run the service on *devices* and yield it once all *workers* are ready, with the seconds."""
    device = ",".join(devices) or ("cpu" if bench.device is None else "0")
    environment = {**os.environ, **settings(bench, device)}
    if _is_taken():
        raise RuntimeError(f"another process answers on port {PORT}; end it first")
    begun = time.perf_counter()
    # The real service; its engine notes when the card begins and ends each picture.
    command = [sys.executable, "-m", "benchmarks.timed_service", f"report={report}"]
    process = subprocess.Popen(command, cwd=_ROOT, env=environment)
    try:
        while not is_ready(workers):
            if process.poll() is not None or time.perf_counter() - begun > 420:
                raise RuntimeError(f"the service did not start, exit code {process.poll()}")
            time.sleep(0.2)
        yield process, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(60)


def _is_taken() -> bool:
    with socket.socket() as asked:
        error: int = asked.connect_ex(("127.0.0.1", PORT))
    return error == 0


def is_ready(workers: int = 1) -> bool:
    """Whether the service answers, and so many of its workers are ready."""
    try:
        return sum(bool(each["ready"]) for each in health()["devices"]) >= workers
    except OSError:
        return False
