"""A small model hub on loopback, with the faults that a real one shows.

It speaks what a client needs for pinned files: HEAD and GET of an address with repository, commit
and path, with ETag, X-Repo-Commit, X-Linked-Size and Range; large files by a redirect to a store
under another host name. `hub.spoil(path, fault, ...)` makes the next answers go wrong, one fault
each.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal

Fault = Literal["cut", "short", "long", "flip", "no_range", "stall", "hush", "empty"] | int


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str


@dataclass
class Hub:
    """Serves *files*, by repository, commit and path, while it is entered."""

    files: dict[tuple[str, str, str], bytes]
    redirect_from_bytes: int = 1 << 62
    """Files of this size and more are redirected to the store."""
    seen: list[Seen] = field(default_factory=list)
    _faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))

    def __enter__(self) -> Hub:
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    def spoil(self, path: str, *faults: Fault) -> None:
        """Let the next answers with the content of *path* go wrong; a number is a status."""
        self._faults[path].extend(faults)

    def take_fault(self, path: str) -> Fault | None:
        """Return what goes wrong now, if anything."""
        return self._faults[path].popleft() if self._faults[path] else None

    def find(self, url: str) -> tuple[str, str, bytes] | None:
        """Return the commit, path and content behind an address, also one of the store."""
        for (repository, commit, path), content in self.files.items():
            if (
                url == f"/{repository}/resolve/{commit}/{path}"
                or url == f"/store/{digest(content)}"
            ):
                return commit, path, content
        return None


def digest(content: bytes) -> str:
    """Return the SHA-256 that the hub publishes for *content*."""
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: a client that goes away in the middle is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        headers = self.headers
        self.server.hub.seen.append(
            Seen(
                self.command,
                self.path,
                headers.get("Range"),
                headers.get("Authorization"),
                headers.get("Host", ""),
            )
        )
        found = self.server.hub.find(self.path)
        if found is None:
            self.refuse(404)
            return
        commit, path, content = found
        is_stored = self.path.startswith("/store/")
        if not is_stored and len(content) >= self.server.hub.redirect_from_bytes:
            self.redirect(commit, content)
            return
        fault = self.server.hub.take_fault(path) if has_body else None
        if isinstance(fault, int):
            self.refuse(fault)
        elif fault == "hush":
            self.hush()
        else:
            self.send(commit, content, fault, has_body=has_body)

    def redirect(self, commit: str, content: bytes) -> None:
        self.send_response(302)
        self.send_header(
            "Location", f"http://localhost:{self.server.hub.port}/store/{digest(content)}"
        )
        self.describe(commit, content)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "17")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def describe(self, commit: str, content: bytes) -> None:
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{digest(content)}"')
        self.send_header("ETag", f'"{digest(content)}"')

    def send(self, commit: str, content: bytes, fault: Fault | None, *, has_body: bool) -> None:
        asked = self.headers.get("Range")
        start = 0 if fault == "no_range" or not asked else int(asked[6:].rstrip("-"))
        body = spoiled(content, fault)[start:]
        declared = len(body) // 2 if fault == "short" else len(body)
        if start > 0:
            self.send_response(206)
            last = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.describe(commit, content)
        self.send_header("Content-Length", str(declared))
        self.end_headers()
        if has_body:
            self.wfile.write(body[: len(body) // 2 if fault in ("cut", "stall") else declared])
        if fault == "stall":
            self.hush()
        if fault == "cut":
            self.close_connection = True

    def hush(self) -> None:
        """Say nothing more until the other end has gone."""
        self.connection.recv(1)
        self.close_connection = True

    def log_message(self, format: str, *values: object) -> None:
        """Stay silent: pytest's output is for its own."""


def spoiled(content: bytes, fault: Fault | None) -> bytes:
    """Return what is sent instead of *content*."""
    if fault == "flip":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if fault == "empty":
        return b""
    return content + b"more" if fault == "long" else content
