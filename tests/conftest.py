"""What many rooms' tests share: a tiny klein on disk, and live services.

The models are tiny, so each process computes with one thread: a second one saves nothing, and where
several processes share few cores the threads wait for one another at every layer, for most of the
time that a run takes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server import Server

# Before anything imports torch; what the caller has set stays.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def _spared() -> None:
    """Take what is there before a module's tests, libraries above all, out of the garbage
    collector's rounds.

    The engine collects after each failed picture and at its end; going through a million objects
    that stay anyway takes a second each time.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Nothing is kept from pytest's own last round, which complains of what nobody closed."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny random checkpoint of klein's shape, in diffusers layout; not to be
    changed by anybody.
    """
    from tests.checkpoints import write_tiny_klein

    folder = write_tiny_klein(tmp_path_factory.mktemp("klein") / "model")
    written = _listed(folder)
    yield folder
    assert _listed(folder) == written


@pytest.fixture(scope="session")
def klein(tiny_klein: Path) -> Iterator[Server]:
    """One service for many tests: klein's ids and limits on tiny random weights, on the CPU."""
    with Server("--model", str(tiny_klein), device="cpu") as server:
        yield server


@pytest.fixture(scope="session")
def shapes() -> Iterator[Server]:
    """The demo model, as everyone has it who has no card."""
    with Server(model="auto", device="cpu") as server:
        yield server


@pytest.fixture
def scripted() -> Iterator[Callable[..., Server]]:
    """Services with scripted faults: `scripted("slow=1", "exit@2", queue_images=4)`."""
    servers: list[Server] = []

    def start(*script: str, **settings: object) -> Server:
        settings.setdefault("model", "shapes")
        settings.setdefault("device", "cpu")
        servers.append(Server(*script, module="tests.faulty", **settings))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()


def _listed(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its size and time of change."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (it.st_size, it.st_mtime_ns) for path, it in found.items()}
