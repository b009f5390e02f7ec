"""Two trees' services on one card at the same time, asked in turn.

    python benchmarks/pair.py --before ~/klein-before --folder /tmp/klein-random

`--before` is a folder with another commit of this repository, which runs with this Python. Both
services stay loaded; in each round both make the same pictures, and the order of the two changes
from round to round, so that the card's temperature and its clocks are the same for both. Rows
`klein.pair` go to benchmarks/results.jsonl (or --out); the last lines are the ratios.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks.bench_http import read_timings
from benchmarks.comfyui.compare import psnr
from benchmarks.rows import Bench

_ROOT = Path(__file__).resolve().parent.parent
_START_S = 420


@dataclass(frozen=True)
class Case:
    """What both are asked for; *counted* pictures a round, after one that is not."""

    note: str
    side: int
    counted: int
    has_reference: bool = False


CASES = (
    Case("a new prompt each", 1024, 7),
    Case("half", 512, 7),
    Case("double", 2048, 7),
    Case("one reference, another each", 1024, 7, has_reference=True),
)


@dataclass
class Service:
    """A running service of one tree."""

    name: str
    port: int
    ready_s: float = 0.0

    def attention(self) -> str:
        """Return the kernel of attention that it took."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/health")
        found = json.loads(connection.getresponse().read())
        connection.close()
        return str((found.get("worker") or {}).get("attention", ""))

    def ask(self, case: Case, number: int) -> tuple[float, dict[str, str], bytes]:
        """Return seconds from the first byte sent to the last read, the headers and the body."""
        asked: dict[str, Any] = {
            "prompt": f"picture {number} {case.note}",
            "width": case.side,
            "height": case.side,
            "num_inference_steps": 4,
            "seed": number,
        }
        if case.has_reference:
            asked["images"] = [_reference(case.side, number)]
        body = json.dumps(asked)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.connect()
        begun = time.perf_counter()
        connection.request("POST", "/generate", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        made = answer.read()
        taken = time.perf_counter() - begun
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{self.name}: {answer.status} {made[:300]!r}")
        return taken, {key.lower(): value for key, value in answer.getheaders()}, made

    def series(
        self, case: Case, first: int
    ) -> tuple[list[float], dict[str, str], dict[str, float], bytes]:
        """Ask for one picture that does not count, which comes last, then for those that do."""
        uncounted = self.ask(case, first)[2]
        asked = [self.ask(case, first + 1 + number) for number in range(case.counted)]
        stages = [read_timings(headers.get("server-timing", "")) for _, headers, _ in asked]
        medians = {
            stage: round(statistics.median(each.get(stage, 0.0) for each in stages) / 1000, 5)
            for stage in stages[0]
        }
        return [seconds for seconds, _, _ in asked], asked[-1][1], medians, uncounted


def main() -> int:
    """Run the rounds, write the rows and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/klein-random"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/klein-cache"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", nargs=2, default=["before", "now"])
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model")
    asked = parser.parse_args()
    bench = Bench(asked.folder, asked.cache, asked.out, asked.tiny)
    trees = (asked.before.resolve(), _ROOT)
    with contextlib.ExitStack() as stack:
        services = [
            stack.enter_context(_service(bench, tree, name, 18_441 + number))
            for number, (tree, name) in enumerate(zip(trees, asked.names, strict=True))
        ]
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for turn in range(asked.rounds):
            for case in _cases(asked.tiny):
                pictures = {}
                for service in services if turn % 2 == 0 else services[::-1]:
                    seconds, headers, stages, made = service.series(case, 1000 * turn)
                    found[case.note, service.name] += seconds
                    pictures[service.name] = made
                    bench.write(
                        "klein.pair",
                        seconds,
                        tree=service.name,
                        width=case.side,
                        height=case.side,
                        note=f"{case.note}; round {turn}, in turn with the other tree",
                        stages=stages,
                        ready_s=round(service.ready_s, 1),
                        attention=service.attention(),
                        peak_reserved_bytes=int(headers.get("x-klein-peak-vram-bytes") or 0)
                        or None,
                    )
                print(f"  PSNR of the two {psnr(*pictures.values()):.1f} dB", flush=True)
    for case in CASES:
        before, now = (statistics.median(found[case.note, each.name]) for each in services)
        print(f"{case.note}: {before:.4f} {now:.4f} s, ratio {now / before:.4f}", flush=True)
    return 0


def _cases(is_tiny: bool) -> Iterator[Case]:
    for case in CASES:
        yield Case(case.note, case.side // 8, 2, case.has_reference) if is_tiny else case


def _reference(side: int, number: int) -> str:
    """Draw a picture that no other request had."""
    small = np.random.default_rng(number).integers(0, 256, (side // 32, side // 32, 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(held, "jpeg")
    return base64.b64encode(held.getvalue()).decode()


@contextlib.contextmanager
def _service(bench: Bench, tree: Path, name: str, port: int) -> Iterator[Service]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")])),
        "KLEIN_MODEL": str(bench.folder),
        "KLEIN_CACHE_DIR": f"{bench.cache}-{name}",
        "KLEIN_PORT": str(port),
        "KLEIN_LOG_LEVEL": "warning",
        "KLEIN_DEVICE": "cpu" if bench.device is None else "0",
    }
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "app", "serve"], cwd=tree, env=environment)
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.perf_counter() - begun > _START_S:
                raise RuntimeError(f"{name} did not start, exit code {process.poll()}")
            time.sleep(0.2)
        service = Service(name, port, time.perf_counter() - begun)
        print(f"{name}: ready after {service.ready_s:.1f} s", flush=True)
        yield service
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    raise SystemExit(main())
