"""What HTTP, queue, pipe and PNG add to a picture: the service beside its own engine, in one run.

    python benchmarks/overhead.py FOLDER [--precision bf16] [--count 20] [--size 1024]

One client with one request in flight, a new prompt each time, after three to warm up; then the same
prompts by the engine called directly in this process. Prints the stages and the peak memory as
/metrics reports them, and one JSON object as the last line. Nothing is compiled where no C compiler
is on the PATH.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent
PORT = 18_433
WARM = 3


def main() -> int:
    """Measure both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--cache", default="/tmp/klein-cache")
    parser.add_argument("--device", default="0")
    asked = parser.parse_args()
    over_http, metrics = _over_http(asked)
    direct = _directly(asked)
    added = statistics.median(over_http) / statistics.median(direct) - 1
    print("\n".join(metrics))
    row = {
        "name": "klein.overhead",
        "precision": asked.precision,
        "width": asked.size,
        "height": asked.size,
        "count": asked.count,
        "http_seconds_median": round(statistics.median(over_http), 5),
        "engine_seconds_median": round(statistics.median(direct), 5),
        "added": round(added, 4),
    }
    print(f"HTTP, queue, pipe and encoding add {added:.1%}")
    print(json.dumps(row))
    return 0


def _over_http(asked: argparse.Namespace) -> tuple[list[float], list[str]]:
    environ = os.environ | {
        "KLEIN_MODEL": str(asked.folder),
        "KLEIN_PORT": str(PORT),
        "KLEIN_DEVICE": asked.device,
        "KLEIN_PRECISION": asked.precision,
        "KLEIN_CACHE_DIR": asked.cache,
        "KLEIN_LOG_LEVEL": "warning",
    }
    service = subprocess.Popen([sys.executable, "-m", "app", "serve"], cwd=ROOT, env=environ)
    try:
        while _ask("GET", "/health/ready")[0] != 200:
            if service.poll() is not None:
                raise RuntimeError("the service did not start")
            time.sleep(0.2)
        seconds = []
        for number in range(WARM + asked.count):
            body = _wish(asked, number)
            begun = time.perf_counter()
            status, data = _ask("POST", "/generate", json.dumps(body).encode())
            taken = time.perf_counter() - begun
            if status != 200:
                raise RuntimeError(data[:300])
            if number >= WARM:
                seconds.append(taken)
        text = _ask("GET", "/metrics")[1].decode()
    finally:
        service.terminate()
        service.wait(60)
    wanted = r"klein_(image_duration_seconds_(sum|count)|last_image_peak_vram_bytes|gpu_)"
    return seconds, [line for line in text.splitlines() if re.match(wanted, line)]


def _directly(asked: argparse.Namespace) -> list[float]:
    from app.domain import ImageSpec
    from app.engine.config import EngineConfig
    from app.engine.engine import KleinEngine

    device = None if asked.device == "cpu" else int(asked.device)
    engine = KleinEngine(
        EngineConfig(
            model="flux.2-klein-4b",
            path=str(asked.folder),
            cache_dir=asked.cache,
            device=device,
            precision=asked.precision,
        )
    )
    engine.load(lambda progress: None)
    seconds = []
    for number in range(WARM + asked.count):
        wish = _wish(asked, number)
        spec = ImageSpec(**wish, guidance_scale=1.0)
        begun = time.perf_counter()
        engine.generate(spec, lambda progress: None, lambda: False)
        if number >= WARM:
            seconds.append(time.perf_counter() - begun)
    engine.close()
    return seconds


def _wish(asked: argparse.Namespace, number: int) -> dict[str, Any]:
    return {
        "prompt": f"picture number {number}",
        "width": asked.size,
        "height": asked.size,
        "num_inference_steps": 4,
        "seed": number,
    }


def _ask(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
