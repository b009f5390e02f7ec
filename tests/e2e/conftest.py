"""Live services for the end-to-end tests: a tiny random klein, and the scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server import Server


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint of klein's shape, in diffusers layout."""
    from tests.checkpoints import write_tiny_klein

    return write_tiny_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def klein(tiny_klein: Path) -> Iterator[Server]:
    """One service for many tests: klein's ids and limits on tiny random weights, on the CPU."""
    with Server("--model", str(tiny_klein), device="cpu") as server:
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
