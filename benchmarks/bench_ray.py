"""Replicas under Ray Serve: pictures in a second by one, and by one for each card, in the same run.

    python benchmarks/bench_gpu.py ray

The pool of one service (`KLEIN_DEVICE=all`) is measured beside them. Without cards two replicas on
the CPU stand in, to rehearse. Ray is that of this environment, else the one that `make test-system`
installs; it runs in a network of its own where that is allowed, since it listens on every address.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.bench_http import PORT, connect, health, post, serve, settings
from benchmarks.rows import Bench
from tests.support.ray_cluster import PYTHON, Cluster, ask, own_network

_START_S = 480.0


def measure(bench: Bench) -> None:
    """Measure one replica, all of them, and the pool, twice in turn."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 2
    device = "cpu" if bench.device is None else "all"
    python = Path(sys.executable) if find_spec("ray") else PYTHON
    if not python.is_file():
        raise RuntimeError("Ray is not installed; tests/cluster/install_ray.sh does it")
    with _network(), tempfile.TemporaryDirectory() as folder:
        # The first start of all fills the caches.
        with serve(bench, Path(folder) / "first"):
            pass
        for turn in range(2):
            with serve(bench, Path(folder) / f"{turn}", _devices(bench, cards), cards):
                _measure(bench, "klein.ray.pool", cards, [PORT], workers=cards)
            for count in (1, cards):
                place = Path(folder) / f"ray-{turn}-{count}"
                place.mkdir()
                with Cluster(place, python, **settings(bench, device)) as cluster:
                    cluster.start(cpus=4 * cards)
                    begun = time.perf_counter()
                    cluster.deploy(None, f"--replicas={count}")
                    cluster.wait_for(count, _START_S)
                    ready_s = round(time.perf_counter() - begun, 1)
                    facts = {"replicas": count, "ready_s": ready_s}
                    _measure(bench, "klein.ray", cards, cluster.ports(), **facts)


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """A network with nothing but loopback, or, where that needs a right we lack, the machine's."""
    with contextlib.ExitStack() as entered:
        try:
            entered.enter_context(own_network())
        except PermissionError as error:
            print(f"  in the machine's own network: {error.strerror}", flush=True)
        yield


def _devices(bench: Bench, count: int) -> list[str]:
    return [f"cpu:{count}"] if bench.device is None else [str(each) for each in range(count)]


def _measure(bench: Bench, name: str, cards: int, ports: Sequence[int], **facts: object) -> None:
    pictures = 4 * cards if bench.is_tiny else 40 * cards
    _at_once(bench, 8 * cards, "warm {}")
    before = _drawn(ports)
    rounds = [_at_once(bench, pictures, f"round {number} {{}}") for number in range(3)]
    after = _drawn(ports)
    bench.write(
        name,
        [seconds / pictures for seconds in rounds],
        **facts,
        width=bench.side,
        height=bench.side,
        note=f"{pictures} at once",
        drawn=[after[port] - before.get(port, 0) for port in after],
        precision=health().get("precision"),
        attention=health().get("attention"),
    )


def _at_once(bench: Bench, pictures: int, what: str) -> float:
    """Return the seconds that *pictures* take at once; a number in *what* makes each another."""
    with ThreadPoolExecutor(pictures) as pool:
        begun = time.perf_counter()
        asked = [
            pool.submit(post, connect(), bench.side, what.format(number))
            for number in range(pictures)
        ]
        for each in asked:
            each.result()
        return time.perf_counter() - begun


def _drawn(ports: Sequence[int]) -> dict[int, int]:
    """Return how many pictures each service has drawn, by its port."""
    drawn = {}
    for port in ports:
        text = ask("GET", "/metrics", port=port).body.decode()
        found = re.findall(r"^klein_images_total{.*} (\S+)$", text, re.M)
        if found:
            drawn[port] = sum(int(float(each)) for each in found)
    return drawn
