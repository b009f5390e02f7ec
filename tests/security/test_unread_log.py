"""A service whose standard error nobody reads answers all the same, and ends when told."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.server import Server

SMALL = {"prompt": "x", "width": 128, "height": 128}


class Unread(Server):
    """A service whose output is not read from its being ready until *hears* is set."""

    def __init__(self, *arguments: str, **settings: object) -> None:
        self.hears = threading.Event()
        super().__init__(*arguments, module="tests.support.scripted_engine", **settings)
        # Less than a page cannot be had; the default of 16 would need more requests to fill.
        fcntl.fcntl(self._output.fileno(), fcntl.F_SETPIPE_SZ, 4096)

    def _read(self) -> None:
        for line in self._output:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
            if "Ready at" in line:
                self.hears.wait()


def refusals(server: Server, count: int) -> set[int]:
    """Ask for what there is not, on one connection: the statuses."""
    statuses = set()
    address = server.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=5)) as connection:
        for _ in range(count):
            connection.request("GET", "/nowhere")
            answer = connection.getresponse()
            answer.read()
            statuses.add(answer.status)
    return statuses


@pytest.fixture
def unread() -> Iterator[Callable[..., Unread]]:
    """Such services; each is heard and stopped when the test is over."""
    servers = []

    def start(*script: str, **settings: object) -> Unread:
        servers.append(Unread(*script, model="shapes", device="cpu", **settings))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.hears.set()
        server.stop()


@pytest.mark.slow
def test_a_log_that_nobody_reads_stops_nobody(unread) -> None:
    """A full pipe: everybody is answered meanwhile, and once it is read no line is missing."""
    server = unread()
    statuses = refusals(server, 150)
    status = server.post("/generate", SMALL)[0]
    server.hears.set()
    server.wait_for("POST /generate was answered")

    assert statuses == {404}
    assert status == 200
    assert sum("GET unmatched was answered" in line for line in server.lines) == 150


@pytest.mark.slow
def test_a_flood_of_refusals_costs_few_lines(unread) -> None:
    """A request of 19 bytes does not buy 265 of log for ever; a picture still has its line."""
    server = unread(log_format="json")
    server.hears.set()
    refusals(server, 400)
    server.post("/generate", SMALL)
    server.stop()

    refused = sum("GET unmatched was answered" in line for line in server.lines)
    (told,) = [line for line in server.lines if "requests more were answered" in line]
    assert refused == 250
    assert '"message": "150 requests more were answered in the last' in told
    assert sum("POST /generate was answered" in line for line in server.lines) == 1


@pytest.mark.system
def test_a_service_whose_log_nobody_reads_ends_when_told(unread) -> None:
    """It waits two seconds for its last lines, worker and all, and no longer."""
    server = unread(log_level="debug")
    refusals(server, 150)

    assert server.process.poll() is None
    server.process.send_signal(15)
    assert server.process.wait(10) == 0
