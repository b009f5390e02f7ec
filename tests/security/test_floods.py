"""A service that is held, flooded, fuzzed or insisted on, as everybody else sees it: figures in
milliseconds and megabytes, and clients that others have written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.security.conftest import connect, read_all
from tests.support.byte_streams import Found, fuzz
from tests.support.server import Server

SMALL = json.dumps({"prompt": "x", "width": 128, "height": 128})
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
UPGRADE = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
UNREAD = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
HELD = 1011
ROUNDS = 3
"""Figures are taken in the best of three rounds: others may use the machine too."""

pytestmark = pytest.mark.system


@pytest.fixture
def usual_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A service started by a shell that allows 1,024 files, as most do, while we may have more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(Server, "fork_server", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    server = Server(module="tests.support.scripted_engine", model="shapes", device="cpu")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    with server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def hold(server: Server, number: int) -> socket.socket:
    """One of the ways in which a connection was kept for ever."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.suppress(OSError):
        client.connect((host, int(port)))
        client.sendall((GET, UPGRADE, GET + b"\r", b"GET", b"", UNREAD * 6)[number % 6])
    return client


def seconds_to_live(server: Server, address: str) -> float:
    """How long a new connection from *address* needs for a whole answer."""
    host, port = server.url.removeprefix("http://").split(":")
    started = time.monotonic()
    with socket.create_connection((host, int(port)), 5, source_address=(address, 0)) as client:
        client.sendall(LIVE)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    return time.monotonic() - started


def pester(clients: list[socket.socket]) -> None:
    """Send a line end on each."""
    for client in clients:
        with contextlib.suppress(OSError):
            client.sendall(b"\r\n")


def until_at_rest(server: Server, clients: list[socket.socket]) -> None:
    """Wait until every request that came is dealt with: it computes no more."""
    process, before = psutil.Process(server.process.pid), -1.0
    while (now := sum(process.cpu_times()[:2])) > before + 0.2:
        before = now
        time.sleep(0.5)  # over this time it is measured
        pester(clients)


def test_a_thousand_held_sockets_keep_nobody_out(usual_service) -> None:
    """With 1,011 sockets that are kept by line ends, upgrades, halves of requests and answers that
    nobody reads, a new connection is answered within 100 ms, from their own address and from
    another one."""
    took_s = []
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(hold(usual_service, number)) for number in range(HELD)]
        until_at_rest(usual_service, sockets)
        for _ in range(ROUNDS):
            pester(sockets)
            took_s.append(max(seconds_to_live(usual_service, f"127.0.0.{last}") for last in (1, 2)))
            if took_s[-1] < 0.1:
                break
        descriptors = psutil.Process(usual_service.process.pid).num_fds()

    assert min(took_s) < 0.1
    assert descriptors <= 768 + 128
    assert "out of system resource" not in usual_service.log


def test_requests_that_are_sent_ahead_fill_no_memory() -> None:
    """With keys set and without one: twenty connections that send requests for three seconds and
    read nothing cost less than 60 MB."""
    server = Server(
        module="tests.support.scripted_engine",
        model="shapes",
        device="cpu",
        api_keys="a-key-of-mine",
    )
    with server, contextlib.ExitStack() as held:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        clients = [held.enter_context(connect(server)) for _ in range(20)]
        for client in clients:
            client.setblocking(False)
        most, until = 0, time.monotonic() + 3
        block = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000
        while time.monotonic() < until:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(block)
            most = max(most, process.memory_info().rss)

    assert most - before < 60e6


def is_fine(found: Found) -> bool:
    """Whether nobody else would have noticed."""
    before, after = found.descriptors
    return (
        found.lag_s < 0.1
        and found.peak_growth_bytes < 100e6
        and after <= before
        and found.is_served
    )


def test_five_hundred_fuzzed_connections_are_noticed_by_nobody(scripted) -> None:
    """The event loop is late by less than 100 ms (its own gauge), memory is bounded, every
    descriptor comes back, and the next picture is made."""
    server = scripted()
    server.wait_until_ready()
    port = int(server.url.rpartition(":")[2])
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(asyncio.run(fuzz(server, seed=20, count=500, port=port)))
        if is_fine(rounds[-1]):
            break

    assert is_fine(rounds[-1]), rounds


def test_jdk_17s_default_client_posts(scripted) -> None:
    """It wants HTTP/2 with every request; it gets its picture over HTTP/1.1, twice."""
    server = scripted()
    server.wait_until_ready()
    java = shutil.which("java")
    assert java is not None
    program = Path(__file__).with_name("PostTwice.java")
    command = [java, str(program), f"{server.url}/generate", SMALL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert ran.stdout.splitlines() == ["200 image/png HTTP_1_1"] * 2


def test_curl_with_http2_posts(scripted) -> None:
    """`curl --http2` asks for the same; with a body that it wants to be asked for, too."""
    server = scripted()
    server.wait_until_ready()
    curl = shutil.which("curl")
    assert curl is not None
    command = [curl, "--http2", "--silent", "--show-error", "--max-time", "20"]
    command += ["--output", "/dev/null", "--write-out", "%{http_code} %{num_connects}\n"]
    command += ["--header", "Content-Type: application/json", f"{server.url}/generate"]
    bodies = [SMALL, " " * 1_500_000 + SMALL]
    ran = [
        subprocess.run(
            [*command, "--data-binary", "@-"], input=body, capture_output=True, text=True
        )
        for body in bodies
    ]

    assert [each.stdout for each in ran] == ["200 1\n"] * 2


@pytest.mark.full
def test_an_accepted_answer_is_taken_to_its_end_though_the_service_ends(scripted) -> None:
    """SIGTERM while a client takes ten megabytes slowly: it gets all of them, after more than the
    half minute that was all it had; the exit code is 0, and nothing is said to be cut."""
    server = scripted("noise=1", deadline_s=60)
    server.wait_until_ready()
    body = json.dumps({"prompt": "x", "n": 10, "size": "512x512"}).encode()
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        host, port = server.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(head % len(body) + body)
        answer = client.recv(1024)
        server.process.send_signal(signal.SIGTERM)
        length = int(answer.lower().partition(b"content-length: ")[2].split()[0])
        started, got = time.monotonic(), len(answer)
        while block := client.recv(65_536):
            got += len(block)
            ahead_s = min(31.5, got / 100_000) - (time.monotonic() - started)
            if ahead_s > 0:
                time.sleep(ahead_s)  # this is how slow it is, until it takes the rest at once
    took_s = time.monotonic() - started

    assert got > length > 9_000_000
    assert took_s > 31
    assert server.wait() == 0
    assert "were cut" not in server.log
