"""What many rooms' tests share: a tiny klein on disk, and live services.

The models are tiny, so each process computes with one thread: a second one saves nothing, and where
several processes share few cores the threads wait for one another at every layer, for most of the
time that a run takes.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import logging
import os
import signal
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support.fork_server import ForkServer
from tests.support.machine import without_page_reporting
from tests.support.server import Server

# Before anything imports torch; what the caller has set stays.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test speaks TLS, but each HTTP client would read the machine's certificates for itself.
ssl.create_default_context = cache(ssl.create_default_context)

# Files that use `shapes`, which each process starts for itself, and its pictures, each made once.
_LIVE = {
    "tests/e2e/test_adherence.py",
    "tests/e2e/test_readme.py",
    "tests/e2e/test_sdapi.py",
    "tests/e2e/test_service.py",
    "tests/shapes/test_precisions.py",
}
# Files that read the whole source, which takes each process a second or two.
_READING = ("tests/docs/", "tests/security/test_limits_page.py", "tests/test_layout.py")
_LONG = {
    "tests/api/test_packages.py",
    "tests/container/test_image.py",
    "tests/release/test_install.py",
    "tests/reliability/test_fuzz.py",
    "tests/reliability/test_lifecycle.py",
    "tests/worker/test_supervisor.py",
}


TOOLS_ALONE_ARE_NEEDED = (
    "tests/api/test_packages.py",
    "tests/api/test_programs.py",
    "tests/browser/",
    "tests/cli/test_completion.py",
    "tests/cli/test_tmux.py",
    "tests/container/",
    "tests/engine/",
    "tests/monitoring/",
    "tests/release/",
    "tests/service/",
)
"""Whose system tests assert no seconds, so that others may run beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, the longest first, so that all processes end at about the same
    time; mark what may have nothing beside it."""
    for item in items:
        if item.get_closest_marker("system") and not item.nodeid.startswith(TOOLS_ALONE_ARE_NEEDED):
            item.add_marker("alone")
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    file = item.nodeid.split("::")[0]
    return 0 if file in _LIVE else 1 if file in _LONG else 2


class _ByService(LoadScopeScheduling):
    """Gives each file to one of several processes, and those that share services, or what they
    have read of the source, to the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        if file in _LIVE:
            return "live"
        return "docs" if file.startswith(_READING) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByService:
    """Divide the tests among processes as above."""
    return _ByService(config, log)


_freeze, _unfreeze = gc.freeze, gc.unfreeze


@pytest.fixture(autouse=True)
def _spared() -> None:
    """Take what is there before a test, libraries above all, out of the garbage collector's
    rounds.

    The engine collects after each failed picture and at its end; going through half a million
    objects that stay anyway takes longer than most tests. Nor does an engine that is closed here
    put them back, which ends its process elsewhere.
    """
    _freeze()


def pytest_collection_finish() -> None:
    """Spare two things of torch's, where it has been imported.

    Its fifty loggers hand on what they are told: to each one that does not, pytest adds its
    handlers and takes them away again, six times in each test.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch":
            logger.propagate = True
    if "torch" in sys.modules:
        from torch.nn import init

        # A hundred tiny models are made without weights first, and torch would draw these too.
        for function in ("kaiming_uniform_", "uniform_"):
            setattr(init, function, _without_meta(getattr(init, function)))


def _without_meta(draw: Callable[..., Any]) -> Callable[..., Any]:
    """*draw* for tensors that have values; those on torch's meta device have none."""

    @wraps(draw)
    def spared(tensor: Any, *more: Any, **named: Any) -> Any:
        return tensor if tensor.is_meta else draw(tensor, *more, **named)

    return spared


@pytest.fixture(scope="session", autouse=True)
def _machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the machine does to every process is none of the service's seconds, where any are
    asserted.
    """
    marks = {mark.name for item in request.session.items for mark in item.iter_markers()}
    with without_page_reporting() if marks & {"system", "full"} else contextlib.nullcontext():
        yield


def pytest_sessionstart() -> None:
    """Fork scripted services instead of starting them; let processes be interrupted, which those
    that a shell starts in the background are not.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    Server.fork_server = ForkServer()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_sessionfinish() -> None:
    """Look once for what nobody closed, of which pytest complains, instead of in each of its own
    last rounds.
    """
    assert Server.fork_server is not None
    Server.fork_server.close()
    _unfreeze()
    gc.collect()
    _freeze()


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny random checkpoint of klein's shape, in diffusers layout; not to be
    changed by anybody.
    """
    from tests.support.checkpoints import write_tiny_klein

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


@pytest.fixture(scope="session")
def render(shapes: Server) -> Callable[..., Any]:
    """Who answers the examination: the service with its demo model, over HTTP.

    `render(prompt, width, height, references)` gives height x width x 3 bytes, in four steps.
    `references` are pictures of the same form. What was asked before is not drawn again.
    """
    import numpy as np
    from PIL import Image

    answers: dict[tuple[object, ...], Any] = {}

    def encoded(pixels: Any) -> str:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return base64.b64encode(file.getvalue()).decode()

    def answer(prompt: str, width: int, height: int, references: Sequence[Any] = ()) -> Any:
        images = [encoded(reference) for reference in references]
        asked = (prompt, width, height, *images)
        if asked not in answers:
            body = {"prompt": prompt, "width": width, "height": height, "seed": 0}
            body |= {"num_inference_steps": 4} | ({"images": images} if images else {})
            status, _, picture = shapes.post("/generate", body)
            assert status == 200, json.loads(picture)
            answers[asked] = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        return answers[asked]

    return answer


@pytest.fixture
def scripted() -> Iterator[Callable[..., Server]]:
    """Services with scripted faults: `scripted("slow=1", "exit@2", queue_images=4)`."""
    servers: list[Server] = []

    def start(*script: str, **settings: object) -> Server:
        settings.setdefault("model", "shapes")
        settings.setdefault("device", "cpu")
        servers.append(Server(*script, module="tests.support.scripted_engine", **settings))
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
