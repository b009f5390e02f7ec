"""What is sent of a request to a collector of traces: every outcome once, and nothing private."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from app import logs
from app.api.app import TRACED, create_app
from app.domain import NO_CARD, ImageSpec
from app.errors import DeadlineExceeded, GenerationFailed, OutOfMemory
from app.request_context import Outcome, RequestContext, current_request
from app.settings import Settings
from app.telemetry import tracing
from app.telemetry.metrics import OUTCOMES, Metrics
from app.telemetry.traces import start_traces
from tests.api.pictures import photo
from tests.api.sockets import listening, until
from tests.support.in_process import InProcess
from tests.support.otlp import ERROR, INTERNAL, OK, SERVER, UNSET, Collector, Span

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE, PARENT = CALLER.split("-")[1:3]
KEY = "canary-of-the-key"
IMAGES = "/v1/images/generations"
SPEC = ImageSpec("a", 64, 128, 3, 1.0, 7)
SECONDS = {"queue": 0.5, "text": 0.02, "reference": 0.25, "denoise": 2.4, "decode": 0.3}
SECONDS |= {"encode": 0.01, "total": 3.5}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the environment names; only the end sends, or a full batch."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
        yield collector


@contextlib.asynccontextmanager
async def client_of(runtime: InProcess, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """Serve *runtime* on a socket; at the end the last spans have been sent."""
    app = create_app(Settings.read({}, image_urls=True, **settings), lambda _: runtime)
    async with listening(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as it:
        yield it


def children(collector: Collector, parent: Span) -> list[Span]:
    """The spans inside *parent*, in the order of their starts."""
    return sorted((it for it in collector.spans if it.parent == parent.id), key=lambda it: it.start)


async def test_a_request_is_part_of_its_callers_trace(collector) -> None:
    """The server's span below the caller's, one below it for each picture, its stages below."""
    async with client_of(InProcess()) as client:
        body = {"prompt": "a", "n": 2, "size": "256x128", "response_format": "url"}
        answer = await client.post(IMAGES, json=body, headers={"traceparent": CALLER})

    assert answer.status_code == 200
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    (server,) = collector.of_kind(SERVER)
    assert (server.name, server.trace, server.parent) == (f"POST {IMAGES}", TRACE, PARENT)
    assert server.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": IMAGES,
        "klein.outcome": "ok",
        "network.protocol.version": "1.1",
        "url.path": IMAGES,
        "url.scheme": "http",
    }
    assert server.resource["service.name"] == "klein-server"
    pictures = children(collector, server)
    assert [(it.name, it.kind) for it in pictures] == [
        ("generate_content flux.2-klein-4b", INTERNAL)
    ] * 2
    assert pictures[0].attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.provider.name": "klein-server",
        "gen_ai.request.model": "flux.2-klein-4b",
        "klein.image.height": 128,
        "klein.image.references": 0,
        "klein.image.steps": 4,
        "klein.image.width": 256,
        "klein.device.name": "cpu",
        "klein.device.uuid": "cpu",
    }
    for picture in pictures:
        stages = children(collector, picture)
        assert {it.name for it in stages} == set(tracing.STAGES)
        assert {it.trace for it in stages} == {TRACE}
        assert not any(it.attributes for it in stages)


def test_stages_are_laid_end_to_end(collector) -> None:
    """Their own seconds each; the queue's has the hand-over too, so that they sum to the total."""
    traces = start_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert traces is not None
    tracer = traces.provider.get_tracer("test")
    with tracer.start_as_current_span("request"):
        trace = traces.current()
        assert trace is not None
        trace.picture_made("m", SPEC, SECONDS, NO_CARD)
    traces.close()

    (picture,) = [it for it in collector.spans if it.name == "generate_content m"]
    stages = children(collector, picture)
    took = {it.name: it.took / 1e9 for it in stages}
    assert sum(took.values()) == pytest.approx(SECONDS["total"], abs=1e-6)
    assert took.pop("queue") == pytest.approx(0.52, abs=1e-6)
    assert took == pytest.approx({name: SECONDS[name] for name in took}, abs=1e-6)
    starts = [picture.start, *(it.end for it in sorted(stages, key=lambda it: it.end))]
    assert [*(it.start for it in stages), picture.end] == starts


async def test_every_outcome_is_one_span(collector) -> None:
    """A caller's mistake, or leaving, is no error of the service; what failed here is."""
    runtime = InProcess(capacity=1)
    failures = {2: DeadlineExceeded("Late."), 3: OutOfMemory("No room."), 4: RuntimeError("Oh.")}
    runtime.worker.errors.update(failures)
    async with client_of(runtime, api_keys=(KEY,)) as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        codes = [
            (await client.post("/generate", json=body, headers=headers)).status_code
            for body, headers in (
                ({"prompt": "a"}, {}),
                ({"prompt": ""}, {}),
                ({"prompt": "a"}, {"authorization": "Bearer wrong"}),
                *(({"prompt": "a"}, {}) for _ in failures),
            )
        ]
        await leave(runtime, client, "/generate", {"prompt": "a"})
        codes.append(await ask_a_full_house(runtime, client))

    assert codes == [200, 400, 401, 504, 500, 500, 503]
    spans = collector.of_kind(SERVER)
    told = [
        (it.attributes["klein.outcome"], it.attributes["http.response.status_code"], it.status)
        for it in spans
    ]
    assert sorted(told) == sorted([
        ("ok", 200, UNSET),
        ("invalid", 400, UNSET),
        ("unauthorized", 401, UNSET),
        ("deadline", 504, ERROR),
        ("oom", 500, ERROR),
        ("error", 500, ERROR),
        ("cancelled", 499, OK),
        ("rejected", 503, ERROR),
        ("ok", 200, UNSET),
        ("ok", 200, UNSET),
    ])  # fmt: skip
    assert {outcome for outcome, *_ in told} == set(OUTCOMES)


async def leave(runtime: InProcess, client: httpx.AsyncClient, path: str, body: object) -> None:
    """Ask, and go while the picture is made."""
    runtime.worker.release.clear()
    runtime.worker.started.clear()
    asking = asyncio.create_task(client.post(path, json=body))
    await runtime.worker.started.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: runtime.queue.running == 0)
    runtime.worker.release.set()


async def ask_a_full_house(runtime: InProcess, client: httpx.AsyncClient) -> int:
    """Ask where one picture is made and another waits; both are made in the end."""
    runtime.worker.release.clear()
    runtime.worker.started.clear()
    first = asyncio.create_task(client.post("/generate", json={"prompt": "a"}))
    await runtime.worker.started.wait()
    second = asyncio.create_task(client.post("/generate", json={"prompt": "a"}))
    await until(lambda: runtime.queue.size == 1)
    refused = await client.post("/generate", json={"prompt": "a"})
    runtime.worker.release.set()
    await asyncio.gather(first, second)
    return refused.status_code


async def test_the_end_of_a_stream_is_told_too(collector) -> None:
    """Its status was sent before: an error in it is one, and a client that has left is none."""
    runtime = InProcess()
    runtime.worker.errors[1] = GenerationFailed("It could not be made.")
    body = {"prompt": "a", "stream": True}
    async with client_of(runtime) as client:
        await client.post(IMAGES, json=body)
        await client.post(IMAGES, json=body)
        await leave(runtime, client, IMAGES, body)

    told = [
        (it.attributes["klein.outcome"], it.attributes.get("error.type"), it.status)
        for it in collector.of_kind(SERVER)
    ]
    assert told == [
        ("error", "generation_failed", ERROR),
        ("ok", None, UNSET),
        ("cancelled", "ConnectionError", OK),
    ]


async def test_nothing_private_is_sent(collector) -> None:
    """No prompt, key, picture, file name, id, query or name of a host; no span for a link."""
    runtime = InProcess(has_metadata=True)
    runtime.worker.errors[3] = RuntimeError("canary-in-an-error")
    said = {"X-Request-Id": "canary-id", "User-Agent": "canary-agent", "X-Api-Key": "canary-key"}
    async with client_of(runtime, api_keys=(KEY,)) as client:
        client.headers.update({"authorization": f"Bearer {KEY}", **said})
        body = {"prompt": "canary-prompt", "response_format": "url", "user": "canary-user"}
        made = await client.post(f"{IMAGES}?name=canary-query", json=body)
        link = made.json()["data"][0]["url"].removeprefix(str(client.base_url).rstrip("/"))
        for path in (link, f"/{link}", f"{link}/", link.replace("/files/", "/%66iles/")):
            await client.get(path)
            await client.post(path)
        upload = {"image": ("canary-file.png", photo()), "prompt": (None, "canary-prompt")}
        edit = await client.post("/v1/images/edits", files=upload)
        failed = await client.post("/generate", json={"prompt": "canary-prompt"})
        await client.request("PROPFIND", "/generate")
        await client.post("/generate", json={"canary-field": 1}, headers={"host": "canary.host"})
        for path in ("/", "/health", "/metrics", "/v1/models", "/v1/jobs", "/static/dom.js"):
            await client.get(path)

    assert (made.status_code, edit.status_code, failed.status_code) == (200, 200, 500)
    name = Path(link).stem
    assert re.fullmatch("[0-9a-f]{32}", name)
    private = [
        b"canary",
        name.encode(),
        bytes.fromhex(name),
        photo()[:64],
        b"127.0.0.1",
        b"PROPFIND",
    ]
    spans = b"".join(body.partition(b"\n\n")[2] for _, body in collector.requests)
    assert [each for each in private if each in spans] == []
    assert len(collector.of_kind(SERVER)) == 5
    assert {it.attributes["url.path"] for it in collector.of_kind(SERVER)} <= TRACED


async def test_the_paths_with_traces_are_those_that_make_pictures() -> None:
    """Those that the description of the interface has, and AUTOMATIC1111's two."""
    async with client_of(InProcess()) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    found = {path for path, methods in paths.items() if "post" in methods}
    found -= {"/sleep", "/wake", "/wake_up", "/v1/tokens"}

    assert found
    assert TRACED - found == {"/sdapi/v1/img2img", "/sdapi/v1/txt2img"}
    assert found <= TRACED


async def test_an_outage_is_said_once_and_so_is_its_end(collector, caplog, monkeypatch) -> None:
    """Pictures are made meanwhile; nothing is said at each try, and no traceback."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    caplog.set_level(logging.INFO, "app")  # a test before may have set it
    collector.status = 400
    async with client_of(InProcess()) as client:
        for count in (1, 2, 3):
            assert (await client.post("/generate", json={"prompt": "a"})).status_code == 200
            await until(lambda count=count: len(collector.requests) >= count, 20)
        await until(lambda: "do not reach" in caplog.text, 20)
        collector.status = 200
        await client.post("/generate", json={"prompt": "a"})
        await until(lambda: "again." in caplog.text, 20)

    ours = [it for it in caplog.records if it.name.startswith(("app.telemetry", "opentelemetry"))]
    assert [it.levelname for it in ours] == ["WARNING", "INFO"]
    assert not any(it.exc_info for it in caplog.records)


@pytest.mark.parametrize(("has_failed", "tries"), [(False, 2), (True, 1)])
def test_the_end_waits_for_no_collector_that_is_down(has_failed, tries, collector) -> None:
    """The last spans are tried once, and not at all where the try before has failed."""
    traces = start_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert traces is not None
    tracer = traces.provider.get_tracer("test")
    for name, status in ("one", 400 if has_failed else 200), ("two", 503):
        collector.status = status
        tracer.start_span(name).end()
        if name == "one":
            traces.provider.force_flush()
    traces.close()

    assert len(collector.requests) == tries
    assert [it.name for it in collector.spans] == ([] if has_failed else ["one"])


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "klein"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_collector_there_are_no_traces(environ, caplog) -> None:
    """Nothing is said either."""
    assert start_traces(environ) is None
    assert not caplog.records


def test_without_a_collector_nothing_is_imported() -> None:
    """Of OpenTelemetry, no more than FastAPI imports itself."""
    code = "import sys; from app.telemetry.traces import start_traces; start_traces({});"
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "app.telemetry.traces" in done.stdout.split()
    assert "opentelemetry" not in done.stdout


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER may be otlp or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf only"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http/protobuf only"),
        ({"absent": "1"}, r"pip install 'fastapi\[opentelemetry\]'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "OTEL_.* cannot be understood"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_sentence(environ, says, caplog, monkeypatch) -> None:
    """The service starts without traces."""
    if environ.pop("absent", None):
        monkeypatch.setitem(sys.modules, "app.telemetry.tracing", None)
    environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert start_traces(environ) is None
    (line,) = caplog.messages
    assert re.search(says, line)
    assert line.count(". ") == 0


def test_a_malformed_header_is_not_repeated(collector, caplog, monkeypatch) -> None:
    """It may hold the collector's key."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "canary of a key")
    traces = start_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert traces is not None
    traces.close()

    assert "canary" not in caplog.text


def test_the_environment_names_the_service(collector, monkeypatch) -> None:
    """As everywhere: OTEL_SERVICE_NAME, and what OTEL_RESOURCE_ATTRIBUTES adds."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "studio")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=home")
    traces = start_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert traces is not None
    traces.provider.get_tracer("test").start_span("one").end()
    traces.close()

    (span,) = collector.spans
    assert span.resource["service.name"] == "studio"
    assert span.resource["deployment.environment.name"] == "home"


class Traced:
    """A trace that only has an id."""

    id = TRACE

    def picture_made(self, *given: object) -> None:
        """Nothing is kept."""

    def settle(self, outcome: Outcome) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("style", ["text", "json"])
def test_log_lines_have_the_traces_id(style, capfd) -> None:
    """Where there is a trace, and nowhere else."""
    handlers, level = logging.root.handlers[:], logging.root.level
    logs.set_up(style=style, level="info")
    try:
        for trace in (Traced(), None):
            token = current_request.set(RequestContext("req_1", trace=trace))
            logging.getLogger("app.x").info("A line.")
            current_request.reset(token)
        logs.flush()
    finally:
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:], logging.root.level = handlers, level
        logging.captureWarnings(False)

    traced, plain = capfd.readouterr().err.splitlines()
    assert (f'"trace_id": "{TRACE}"' if style == "json" else f"trace_id={TRACE}") in traced
    assert "trace_id" not in plain


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("application/openmetrics-text; version=1.0.0,text/plain;q=0.5", True),
        ("text/plain, application/openmetrics-text;version=1.0.0", True),
        ("text/plain;version=0.0.4", False),
        ("*/*", False),
        ("application/openmetrics-textual", False),
        ("", False),
    ],
)
def test_buckets_lead_to_traces_where_the_scrape_asks(accept, is_openmetrics) -> None:
    """OpenMetrics has exemplars; Prometheus' text format is what everyone else gets."""
    metrics = Metrics(version="1")
    token = current_request.set(RequestContext("req_1", trace=Traced()))
    metrics.request_finished("/generate", "ok", 0.3)
    current_request.reset(token)
    metrics.request_finished("/generate", "ok", 3.3)
    body, kind = metrics.scrape().exposition(accept)
    text = body.decode()

    assert text.endswith("# EOF\n") is is_openmetrics
    assert kind.startswith("application/openmetrics-text; version=1.0.0") is is_openmetrics
    marked = [line for line in text.splitlines() if "trace_id" in line]
    assert len(marked) == is_openmetrics
    assert all('le="0.35"' in line for line in marked)
    assert all(f' 1.0 # {{trace_id="{TRACE}"}} 0.3 ' in line for line in marked)


@pytest.mark.slow
def test_a_service_sends_its_pictures_way(collector, scripted) -> None:
    """Through both processes: the spans' times are those of the answer, the log and the buckets
    name the trace, and the last spans are sent before the service ends.
    """
    server = scripted("slow=0.05", log_format="json")
    server.wait_until_ready()
    status, headers, _ = server.post("/generate", {"prompt": "a"}, traceparent=CALLER)
    asks = "application/openmetrics-text; version=1.0.0"
    exemplars = server.get("/metrics", accept=asks)[2].decode()
    assert server.stop() == 0

    assert status == 200
    timing = {
        name: float(took)
        for name, took in re.findall(r"(\w+);dur=([\d.]+)", headers["server-timing"])
    }
    (span,) = collector.of_kind(SERVER)
    (picture,) = children(collector, span)
    took = {it.name: it.took / 1e6 for it in children(collector, picture)}
    assert sum(took.values()) == pytest.approx(timing.pop("total"), abs=5)
    took.pop("queue")
    timing.pop("queue")
    assert took == pytest.approx(timing, abs=5)
    assert (span.parent, span.trace) == (PARENT, TRACE)
    (line,) = [json.loads(it) for it in server.lines if "POST /generate" in it]
    assert line["trace_id"] == TRACE
    for name in ("klein_image_duration", "klein_request_duration", "klein_queue_wait"):
        assert re.search(rf'{name}_seconds_bucket{{.*# {{trace_id="{TRACE}"}}', exemplars)


@pytest.mark.system
@pytest.mark.parametrize("listens", [False, True])
def test_a_collector_that_is_down_costs_less_than_a_millisecond(listens, monkeypatch) -> None:
    """For each picture, whether nobody listens or nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if listens else 9
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        traces = start_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "set"})
        assert traces is not None
        tracer = traces.provider.get_tracer("test")
        began = time.perf_counter()
        for _ in range(1000):
            with tracer.start_as_current_span("request"):
                trace = traces.current()
                assert trace is not None
                trace.picture_made("m", SPEC, SECONDS, NO_CARD)
                trace.settle(Outcome("ok"))
        made = time.perf_counter()
        traces.close()

    assert (made - began) / 1000 < 0.001


@pytest.mark.system
def test_a_collector_that_is_down_delays_no_drain(scripted, monkeypatch) -> None:
    """A service ends as soon as one without traces where nobody listens, and a second later where
    nobody answers.
    """
    took_s = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (None, 9, silent.getsockname()[1]):
            endpoint = f"http://127.0.0.1:{port}" if port else ""
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
            server = scripted("slow=0.05")
            server.wait_until_ready()
            assert server.post("/generate", {"prompt": "a"})[0] == 200
            began = time.perf_counter()
            assert server.stop() == 0
            took_s.append(time.perf_counter() - began)
            assert "Traceback" not in server.log
            assert server.log.count("reach their collector") <= 1

    without, refused, silent_s = took_s
    assert refused - without < 0.2
    assert silent_s - without < tracing.FLUSH_S + 0.2
