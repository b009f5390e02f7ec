"""A real service under the bodies and pictures that held up its event loop, four at a time, while
somebody else asks whether it lives.

Most bodies are of sixty megabytes. Lag is told by the service, and seen from outside by a process
of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.api.pictures import photo
from tests.data.hostile import interlaced, many_scans, slow_jpeg
from tests.e2e.test_service import wait_until
from tests.security.conftest import connect, read_all
from tests.security.test_connections import peak_bytes, status_of
from tests.support.server import Server

pytestmark = pytest.mark.system

BOUND_S = 0.1
LARGE = 60_000_000
JSON = b"application/json"
FORM = b"multipart/form-data; boundary=B"
TEXT = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
FILE = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

PROBE = """
import http.client, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
worst = 0.0
while True:
    started = time.perf_counter()
    connection.request("GET", "/health/live")
    connection.getresponse().read()
    worst = max(worst, time.perf_counter() - started)
    print(worst, flush=True)
    time.sleep(0.005)
"""


def pictured(text: bytes) -> bytes:
    """A body of /generate with this as its picture."""
    return b'{"prompt": "a", "images": ["' + text + b'"]}'


def slow() -> bytes:
    """A body of /generate whose pictures take more than the processor time that they may."""
    over = b'"], "mask": "' + base64.b64encode(interlaced(5000)) + b'", "x": ["'
    pictures = b'","'.join([base64.b64encode(slow_jpeg())] * 4)
    return pictured(pictures + over).replace(b', "x": [""]', b"")


def texts(count: int, size: int) -> bytes:
    """A form of texts, which take four times their bytes as strings."""
    part = b'--B\r\nContent-Disposition: form-data; name="t%d"\r\n\r\n%s\r\n'
    text = b"a" * size + "🐻".encode()
    return b"".join(part % (number, text) for number in range(count)) + b"--B--\r\n"


BODIES: dict[str, tuple[str, bytes, Callable[[], bytes]]] = {
    "punycode": (
        "/v1/images/edits",
        FORM + b"; charset=punycode",
        lambda: TEXT + b"-" + b"a" * 1_000_000 + b"\r\n--B--\r\n",
    ),
    "a text": ("/generate", JSON, lambda: b'{"prompt": "' + b"a" * LARGE + b'"}'),
    "a text of a plain request": (
        "/v1/images/generations",
        JSON,
        lambda: b'{"prompt": "' + b"a" * LARGE + b'"}',
    ),
    "a name": ("/generate", JSON, lambda: b'{"' + b"a" * LARGE + b'": 1}'),
    "objects": ("/generate", JSON, lambda: b'{"a": [' + b"{}," * (LARGE // 3) + b"{}]}"),
    "objects in an edit": (
        "/v1/images/edits",
        JSON,
        lambda: b'{"a": [' + b"{}," * (LARGE // 3) + b"{}]}",
    ),
    "escapes": ("/generate", JSON, lambda: pictured(rb"\u002b" * (LARGE // 6))),
    "base64 of nothing": ("/generate", JSON, lambda: pictured(b"A" * 20_000_000)),
    "a form's file": (
        "/v1/images/edits",
        FORM,
        lambda: TEXT + b"a\r\n" + FILE + b"\r\n--" * (LARGE // 4) + b"\r\n--B--\r\n",
    ),
    "a form's digits": (
        "/v1/images/edits",
        FORM,
        lambda: (
            TEXT.replace(b"prompt", b"guidance_scale")
            + b"1" * 1_000_000
            + b"x\r\n"
            + FILE
            + b"a\r\n--B--\r\n"
        ),
    ),
    "a form's texts": ("/v1/images/edits", FORM, lambda: texts(63, 1_000_000)),
    "a form's longest texts": ("/v1/images/edits", FORM, lambda: texts(63, 127_990)),
    "scans": ("/generate", JSON, lambda: pictured(base64.b64encode(many_scans(1000, 1000, 400)))),
    "slow pictures": ("/generate", JSON, slow),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One service for all: as it comes, with a scripted engine."""
    with Server(
        "slow=0", module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    ) as server:
        yield server


def send(server: Server, path: str, kind: bytes, body: bytes) -> bytes:
    """Send a body whole, and read what comes."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n"
    ).encode()
    with connect(server, timeout_s=60) as connection:
        with contextlib.suppress(ConnectionError):  # refused before its end
            connection.sendall(head + b"Content-Type: " + kind + b"\r\n\r\n")
            connection.sendall(body)
        return read_all(connection)


@contextlib.contextmanager
def probed(server: Server) -> Iterator[list[float]]:
    """Ask again and again whether the service lives; gives the longest answer, in seconds."""
    port = server.url.rpartition(":")[2]
    worst: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-c", PROBE, port], stdout=subprocess.PIPE, text=True
    ) as probe:
        assert probe.stdout is not None
        probe.stdout.readline()
        try:
            yield worst
        finally:
            probe.kill()
            lines = probe.stdout.read().splitlines()
            worst.append(float(lines[-2 if len(lines) > 1 else -1]))


@pytest.mark.parametrize("name", BODIES)
def test_nobody_else_waits(name) -> None:
    """Four at once are refused, and lag and answer stay within a tenth of a second."""
    path, kind, make = BODIES[name]
    body = make()
    with Server(
        "slow=0", module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    ) as server:
        with probed(server) as worst, ThreadPoolExecutor(4) as senders:
            answers = list(senders.map(lambda _: send(server, path, kind, body), range(4)))

        assert [answer for answer in answers if not 400 <= status_of(answer) < 500] == []
        assert server.metric("klein_event_loop_lag_seconds") < BOUND_S
        assert worst[0] < BOUND_S
        assert server.post("/generate", {"prompt": "a"})[0] == 200


def test_a_large_answer_holds_up_nobody() -> None:
    """Ten pictures of the largest size that no file format makes small: 168 MB in one answer."""
    body = {"prompt": "a", "n": 10, "size": "2048x2048"}
    with Server(
        "slow=0",
        "noise=1",
        module="tests.support.scripted_engine",
        model="flux.2-klein-4b",
        device="cpu",
    ) as server:
        with probed(server) as worst:
            status, _, answer = server.post("/v1/images/generations", body)

        assert (status, len(answer) > 160_000_000) == (200, True)
        assert server.metric("klein_event_loop_lag_seconds") < BOUND_S
        assert worst[0] < BOUND_S


def test_a_hundred_unread_answers_take_little_memory() -> None:
    """Each of eight megabytes, behind a link: a few pieces for each socket, not the whole."""
    body = {"prompt": "a", "size": "1664x1664", "response_format": "url"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            Server(
                "noise=1",
                module="tests.support.scripted_engine",
                model="flux.2-klein-4b",
                device="cpu",
            )
        )
        answer = json.loads(server.post("/v1/images/generations", body)[2])
        path = "/" + answer["data"][0]["url"].split("/", 3)[3]
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(1)
        wait_until(lambda: server.get("/health/live")[0] == 200)
        grown = process.memory_info().rss - before

    assert grown < 60e6


SHAPES = {
    "base64": ("/generate", lambda: pictured(b"A" * LARGE)),
    "base64 with a slash": ("/generate", lambda: pictured(rb"AAAAAAAA\/AAAAAAA" * (LARGE // 17))),
    "escapes": ("/generate", lambda: pictured(rb"\u002b" * (LARGE // 6))),
    "three pictures": ("/generate", lambda: pictured(b'","'.join([b"A" * 20_000_000] * 3))),
    "objects": ("/generate", lambda: b'{"a": [' + b"{}," * (LARGE // 3) + b"{}]}"),
    "strings": ("/generate", lambda: b'{"a": ["' + b'","'.join([b"a" * 70_000] * 850) + b'"]}'),
    "letters": ("/generate", lambda: pictured("é熊🐻".encode() * (LARGE // 9))),
    "a name": ("/generate", lambda: b'{"' + b"a" * LARGE + b'": 1}'),
    "a form's texts": ("/v1/images/edits", lambda: texts(63, 1_000_000)),
    "a form's longest texts": ("/v1/images/edits", lambda: texts(63, 127_990)),
    "a form": (
        "/v1/images/edits",
        lambda: TEXT + b"a\r\n" + FILE + photo() + b"\0" * 49_000_000 + b"\r\n--B--\r\n",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_body_takes_at_most_three_times_its_bytes(name) -> None:
    """Of memory, at its peak, whatever is in it; of one that is used as of one that is refused."""
    path, make = SHAPES[name]
    body = make()
    with Server(
        "slow=0", module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    ) as server:
        server.post("/generate", {"prompt": "a"})
        before = peak_bytes(server)
        kind = FORM if path.endswith("edits") else JSON
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: {kind.decode()}\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(server, timeout_s=60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head.encode() + body)
            answer = read_all(connection)

        assert status_of(answer) in {200, 400, 413}
        assert peak_bytes(server) - before < 3 * len(body)


def test_a_caller_who_leaves_frees_the_decoders(server) -> None:
    """Four leave with half a minute of decoding behind them; the next is served at once."""
    body = slow()
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as leaving:
        for _ in range(4):
            leaving.enter_context(connect(server)).sendall(head + body)
        wait_until(lambda: _is_decoding(server))

    started = time.perf_counter()
    status = server.post("/generate", {"prompt": "a", "images": [_small()]})[0]

    assert status == 200
    assert time.perf_counter() - started < 2


def test_a_second_sigterm_ends_while_decoders_work() -> None:
    """Within five seconds, and nothing of the service is left."""
    body = slow()
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    server = Server(
        "slow=0", module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    )
    with server, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(server)).sendall(head + body)
        wait_until(lambda: _is_decoding(server))
        processes = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Told to stop")
        started = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 143

    assert time.perf_counter() - started < 5
    _, left = psutil.wait_procs(processes, timeout=2)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


def _is_decoding(server: Server) -> bool:
    """Whether a decoder has worked for a while; an idle one has computed nothing to speak of."""
    with contextlib.suppress(psutil.Error):
        service = psutil.Process(server.process.pid)
        decoders = [each for child in service.children() for each in child.children()]
        return any(decoder.cpu_times().user > 0.2 for decoder in decoders)
    return False


def _small() -> str:
    return base64.b64encode(photo()).decode()
