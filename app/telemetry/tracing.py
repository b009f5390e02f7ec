"""Traces: the spans of a request and its pictures, under which names, and how they are sent.

FastAPI makes the server span, with the caller's as its parent. A picture's spans are made here in
one go once it is finished, from the times that were taken anyway. Only this module imports
OpenTelemetry, and only `app.telemetry.traces` imports it, where traces are wanted.

Every name of an attribute is here. Those of pictures are OpenTelemetry's for generative AI where it
has one (status: development): https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
No value is a client's text: what FastAPI would add of it, such as a query, is left out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, TraceState
from opentelemetry.util.types import Attributes

from app import __version__
from app.domain import Device, ImageSpec
from app.request_context import Outcome

_log = logging.getLogger(__name__)

NAME = "klein-server"
FLUSH_S = 1.0
"""Seconds for which the last spans are awaited at the end, unless their collector is down."""

STAGES = ("queue", "text", "reference", "denoise", "decode", "encode")
_OPERATION = "generate_content"

_GIVEN = frozenset({
    "http.request.method", "network.protocol.version", "url.path", "url.scheme",
    "gen_ai.operation.name", "gen_ai.output.type", "gen_ai.provider.name", "gen_ai.request.model",
    "klein.image.height", "klein.image.references", "klein.image.steps", "klein.image.width",
    "klein.device.name", "klein.device.uuid",
})  # fmt: skip
"""What a span may begin with. FastAPI adds http.route, http.response.status_code, error.type."""
_OUTCOME = "klein.outcome"
_ERROR = "error.type"

_SENDS = OTLPSpanExporter.__module__
"""The logger that tells of a collector that is down at each try."""
_SILENT = ("opentelemetry.sdk._shared_internal", "opentelemetry.util.re")
"""Loggers of each span that is dropped, and of malformed OTEL_EXPORTER_OTLP_HEADERS with their
text, which may hold a key."""


class Traces:
    """Makes and sends spans as the variables `OTEL_*` say, which OpenTelemetry reads itself.

    Sending has a thread of its own; what it cannot send in time is dropped.
    """

    def __init__(self) -> None:
        for name in _SILENT:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._exporter = _Exporter()
        logging.getLogger(_SENDS).filters[:] = [self._exporter.hear]
        self.provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self.provider.sampler = _Clean(self.provider.sampler)
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self.provider.get_tracer(NAME, __version__)

    def current(self) -> RequestTrace | None:
        """Return the trace of the request whose span is the current one, if it is recorded."""
        span = trace.get_current_span()
        return RequestTrace(self._tracer, span) if span.is_recording() else None

    def close(self) -> None:
        """Send the last spans, for `FLUSH_S` at most; a collector that is down is not awaited."""
        if self._exporter.is_failing:
            return
        self._exporter.is_closing = True
        # Not an executor's: those are awaited when the process ends.
        sending = threading.Thread(target=self.provider.shutdown, name="last traces", daemon=True)
        sending.start()
        sending.join(FLUSH_S)


class RequestTrace:
    """The trace that one request is part of."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._is_settled = False
        self.id = trace.format_trace_id(span.get_span_context().trace_id)

    def picture_made(
        self, model: str, spec: ImageSpec, seconds: Mapping[str, float], device: Device
    ) -> None:
        """Add the spans of a picture that ends now, and that *device* has made.

        *seconds* has one entry for each of `STAGES`, and the `total`. They are laid end to end, so
        the queue's has what lies between them too: the way to the worker and back.
        """
        borders = _borders(time.time_ns(), seconds)
        picture = self._tracer.start_span(
            f"{_OPERATION} {model}",
            trace.set_span_in_context(self._span),
            attributes={
                "gen_ai.operation.name": _OPERATION,
                "gen_ai.output.type": "image",
                "gen_ai.provider.name": NAME,
                "gen_ai.request.model": model,
                "klein.image.height": spec.height,
                "klein.image.references": len(spec.references),
                "klein.image.steps": spec.num_inference_steps,
                "klein.image.width": spec.width,
                "klein.device.name": device.name,
                "klein.device.uuid": device.uuid,
            },
            start_time=borders[0],
        )
        inside = trace.set_span_in_context(picture)
        for stage, (starts_at, ends_at) in zip(STAGES, pairwise(borders), strict=True):
            self._tracer.start_span(stage, inside, start_time=starts_at).end(ends_at)
        picture.end(borders[-1])

    def settle(self, outcome: Outcome) -> None:
        """Say how the request ended; the first word counts.

        FastAPI judges by the status, which does not show the error in a stream, and takes a client
        that has left for an error.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self._span.set_attribute(_OUTCOME, outcome.name)
        if outcome.fault is not None:
            self._span.set_attribute(_ERROR, outcome.fault)
            self._span.set_status(Status(StatusCode.ERROR))
        elif outcome.name == "cancelled":
            self._span.set_status(Status(StatusCode.OK))  # the only one that stays


def _borders(ends_at: int, seconds: Mapping[str, float]) -> list[int]:
    """Return where each stage starts, and the end, in nanoseconds since 1970."""
    borders = [ends_at]
    for stage in reversed(STAGES[1:]):
        borders.insert(0, borders[0] - round(seconds[stage] * 1e9))
    return [min(borders[0], ends_at - round(seconds["total"] * 1e9)), *borders]


def _resource() -> Resource:
    """Return what all spans are of: this service, unless the environment names another."""
    ours = Resource({SERVICE_NAME: NAME, SERVICE_VERSION: __version__})
    return Resource.create(dict(ours.merge(OTELResourceDetector().detect()).attributes))


class _Clean(Sampler):
    """Decides as *judge* does; lets spans begin with the attributes that are known here only."""

    def __init__(self, judge: Sampler) -> None:
        self._judge = judge

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide about one span."""
        kept = {key: value for key, value in (attributes or {}).items() if key in _GIVEN}
        return self._judge.should_sample(
            parent_context, trace_id, name, kind, kept, links, trace_state
        )

    def get_description(self) -> str:
        """Return the judge's."""
        return self._judge.get_description()


class _Exporter(SpanExporter):
    """Sends over OTLP, and tries again for a while; an outage is logged once, and so is its end."""

    def __init__(self) -> None:
        self._inner = OTLPSpanExporter()
        self._is_down = False
        self.is_failing = False
        """Whether the last try has failed."""
        self.is_closing = False
        """Whether the next one that fails is the last."""

    def hear(self, record: logging.LogRecord) -> bool:
        """Learn from OpenTelemetry's own log line that a try has failed; let none through."""
        self.is_failing = True
        if self.is_closing:
            self.is_closing = False
            self._inner.shutdown()  # type: ignore[no-untyped-call]
        return False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send *spans*, on the thread of the batches."""
        result = self._inner.export(spans)
        was_down = self._is_down
        self._is_down = self.is_failing = result is not SpanExportResult.SUCCESS
        if self._is_down and not was_down:
            _log.warning(
                "Traces do not reach their collector and are dropped; pictures are made as before. "
                "This is said again when it has changed."
            )
        elif was_down and not self._is_down:
            _log.info("Traces reach their collector again.")
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self._inner.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept back."""
        return True
