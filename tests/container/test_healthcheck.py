"""The script that asks the service in its container whether it lives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "healthcheck.py"


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers every GET with *status* and remembers what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def check(port: int, **environ: str) -> int:
    """Run the script as the image does and return its exit code."""
    command = [sys.executable, "-IS", str(SCRIPT)]
    given = os.environ | {"KLEIN_PORT": str(port)} | environ
    return subprocess.run(command, env=given, timeout=20, check=False).returncode


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
def test_only_a_good_answer_is_health(status: int, expected: int) -> None:
    """And the question is the one that says alive, not ready."""
    with answering(status) as (port, asked):
        assert check(port) == expected

    assert asked == ["/health/live"]


def test_no_answer_is_no_health() -> None:
    """A port that nobody listens on gives exit code 1, not a traceback's."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert check(unused.getsockname()[1]) == 1


def test_a_proxy_is_never_asked() -> None:
    """A machine's proxy settings would send the question out of the container."""
    with answering(200) as (port, asked):
        assert check(port, http_proxy="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1") == 0

    assert asked == ["/health/live"]
