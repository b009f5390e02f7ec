"""A collector of traces: takes OTLP over HTTP, in protobuf, at a loopback port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

SERVER, INTERNAL = 2, 1
"""Kinds of spans, as they are sent."""
UNSET, OK, ERROR = 0, 1, 2
"""States of spans, as they are sent."""


@dataclass(frozen=True)
class Span:
    """One span as it was received; ids are hexadecimal, times nanoseconds since 1970."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start: int
    end: int
    status: int
    attributes: dict[str, object]
    resource: dict[str, object]

    @property
    def took(self) -> int:
        """Its nanoseconds."""
        return self.end - self.start


class Collector:
    """`with Collector() as collector:` is one that listens; *status* is what it answers."""

    def __init__(self) -> None:
        self.status = 200
        self.requests: list[tuple[str, bytes]] = []
        """Path and body of each, with its head before it."""
        self.spans: list[Span] = []
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="collector", daemon=True
        )

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def received(self) -> bytes:
        """Everything that was received, heads included."""
        return b"\n".join(body for _, body in self.requests)

    def of_kind(self, kind: int) -> list[Span]:
        """The spans of one kind, in the order in which they ended."""
        return sorted((span for span in self.spans if span.kind == kind), key=lambda it: it.end)

    def wait_for(self, is_met: Callable[[Collector], object], *, timeout_s: float = 30.0) -> None:
        """Wait until what was received meets a condition."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not is_met(self):
                assert time.monotonic() < deadline, [span.name for span in self.spans]
                self._changed.wait(1.0)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector._take(self.path, str(self.headers).encode(), body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing is logged."""

        return Handler

    def _take(self, path: str, head: bytes, body: bytes) -> None:
        with self._changed:
            self.requests.append((path, head + body))
            if self.status == 200:
                self.spans += _read(body)
            self._changed.notify_all()


def _read(body: bytes) -> list[Span]:
    return [
        Span(
            name=each.name,
            kind=each.kind,
            trace=each.trace_id.hex(),
            id=each.span_id.hex(),
            parent=each.parent_span_id.hex(),
            start=each.start_time_unix_nano,
            end=each.end_time_unix_nano,
            status=each.status.code,
            attributes=_values(each.attributes),
            resource=_values(of.resource.attributes),
        )
        for of in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in of.scope_spans
        for each in scope.spans
    ]


def _values(attributes: Any) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
