"""Attacks that were made on other servers, tried on this one."""

from __future__ import annotations

import ast
import base64
import http.server
import importlib.metadata
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fastapi.routing import APIRoute

from app.api.app import create_app
from app.engine.models.registry import MODELS
from app.errors import StartupError
from app.settings import Settings
from tests.e2e.test_service import wait_until
from tests.images import picture, saved
from tests.images.test_bombs import png_bomb
from tests.security.conftest import KEY, send_raw
from tests.security.test_connections import peak_bytes
from tests.support.fakes import FakeRuntime
from tests.support.server import ROOT, Server
from tests.support.sources import tree_of
from tools import audit

slow = pytest.mark.slow
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/home|/usr|/root|/work|site-packages|Traceback|/dev/shm|psm_")
ROUTES = {
    "DELETE /v1/jobs/{id}",
    "GET /",
    "GET /docs",
    "GET /health",
    "GET /health/live",
    "GET /health/ready",
    "GET /is_sleeping",
    "GET /metrics",
    "GET /openapi.json",
    "GET /sdapi/v1/latent-upscale-modes",
    "GET /sdapi/v1/loras",
    "GET /sdapi/v1/options",
    "GET /sdapi/v1/progress",
    "GET /sdapi/v1/samplers",
    "GET /sdapi/v1/schedulers",
    "GET /sdapi/v1/sd-models",
    "GET /sdapi/v1/sd-modules",
    "GET /sdapi/v1/sd-vae",
    "GET /sdapi/v1/upscalers",
    "GET /static/{name}",
    "GET /v1/images/files/{name}",
    "GET /v1/jobs",
    "GET /v1/loras",
    "GET /v1/loras/{name}",
    "GET /v1/loras/{name}/preview",
    "GET /v1/models",
    "GET /v1/models/{id:path}",
    "POST /generate",
    "POST /sdapi/v1/img2img",
    "POST /sdapi/v1/interrupt",
    "POST /sdapi/v1/options",
    "POST /sdapi/v1/refresh-loras",
    "POST /sdapi/v1/txt2img",
    "POST /sleep",
    "POST /v1/images",
    "POST /v1/images/edits",
    "POST /v1/images/generations",
    "POST /v1/tokens",
    "POST /wake",
    "POST /wake_up",
}


@pytest.fixture(scope="module")
def locked_service() -> Iterator[Server]:
    """A service with a key."""
    with Server(
        module="tests.support.scripted_engine",
        model="shapes",
        device="cpu",
        api_keys=KEY,
        log_format="json",
    ) as server:
        yield server


def error_of(body: bytes) -> dict[str, str | None]:
    """The error object of an answer, which leaks nothing."""
    assert not LEAKS.search(body.decode())
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def form(fields: dict[str, str], files: list[tuple[str, str, bytes]]) -> tuple[bytes, str]:
    """A multipart body, with file names as they are."""
    lines = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    lines += [
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, filename, data in files
    ]
    return b"".join(lines) + b"--x--\r\n", "multipart/form-data; boundary=x"


@slow
@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/v1/models", "x/health/live?"),
        ("/v1/models", "x?"),
        ("/v1/models", "x#"),
        ("//v1/models", "localhost"),
        ("/%761/models", "localhost"),
        ("/health/live/../../v1/models", "localhost"),
        ("http://localhost/v1/models", "localhost"),
        ("http://localhost/health/live?/../v1/models", "x/health"),
        ("/v1/models?/health/live", "localhost"),
        ("/static/../v1/models", "localhost"),
        ("/static/..%2f..%2fv1/models", "localhost"),
    ],
)
def test_no_spelling_opens_a_door(locked_service, target, host) -> None:
    """CVE-2026-48710, CVE-2026-48746: without the key neither the Host nor the target,
    also in its absolute form, gives anything away."""
    head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = send_raw(locked_service, head.encode())

    assert b"flux" not in answer
    assert b'"object"' not in answer
    assert answer.split()[1] in {b"400", b"401", b"404"} or b"alive" in answer


@slow
@pytest.mark.parametrize("key", ["wrong-key-00000", "schl\xfcssel", "", KEY[:-1], KEY + "x"])
def test_a_wrong_key_is_401_whatever_its_bytes(locked_service, key) -> None:
    """CVE-2025-59425: digests are compared in constant time (tests/api/test_auth.py), and
    odd bytes do not break the comparison."""
    head = (
        f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\napi-key: {key}\r\n\r\n"
    )
    answer = send_raw(locked_service, head.encode("latin-1"))

    assert answer.split()[1] == b"401"


def test_the_container_is_published_on_the_loopback_address_only() -> None:
    """Inside it listens everywhere, as it must; outside only this machine reaches it."""
    text = (ROOT / "compose.yaml").read_text()

    assert Settings.read({}).host == "127.0.0.1"
    assert "127.0.0.1:" in text
    assert "KLEIN_TRUST_NETWORK" in text
    assert not re.search(r"^\s*-\s*[\"']?\d+:\d+", text, re.MULTILINE)


@slow
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_web_page_cannot_drive_the_card(scripted_service, kind) -> None:
    """CVE-2024-28224: what a page may send unasked is refused for its origin, and by its
    type where a browser tells no origin; no answer lets a page read it."""
    before = scripted_service.metric("klein_images_total")
    headers = {"content_type": kind, "origin": "http://evil.example"}
    status, found, _ = scripted_service.request("POST", "/generate", b'{"prompt": "x"}', **headers)
    preflight, allowed, _ = scripted_service.request("OPTIONS", "/generate", **headers)
    del headers["origin"]
    silent, _, _ = scripted_service.request("POST", "/generate", b'{"prompt": "x"}', **headers)

    assert (status, silent) == (403, 415)
    assert preflight == 405
    assert not [name for name in {**found, **allowed} if name.startswith("access-control")]
    assert scripted_service.metric("klein_images_total") == before


@slow
@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}],
)
def test_a_form_of_another_origin_makes_no_picture(scripted_service, headers) -> None:
    """Edits take multipart forms, which a page sends without anybody's leave: 403."""
    before = scripted_service.metric("klein_images_total")
    image = saved(picture("smooth").resize((128, 128)), "PNG")
    body, kind = form({"prompt": "x", "size": "128x128"}, [("image", "a.png", image)])
    status, _, answer = scripted_service.request(
        "POST", "/v1/images/edits", body, content_type=kind, **headers
    )

    assert (status, error_of(answer)["code"]) == (403, "origin_not_allowed")
    assert scripted_service.metric("klein_images_total") == before


WATCH = """
import os, sys
def _watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os.write(2, f"WATCH open {arguments[0]!r}\\n".encode())
    elif event in {"os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"}:
        os.write(2, f"WATCH {event} {arguments!r}\\n".encode())
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        os.write(2, f"WATCH connect {arguments[1]!r}\\n".encode())
    elif event in {"subprocess.Popen", "os.system", "os.exec"}:
        os.write(2, f"WATCH {event}\\n".encode())
sys.addaudithook(_watch)
"""


@pytest.fixture(scope="module")
def watched_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service, with its worker, whose every write to the disk and every connection is told."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        server = Server(module="tests.support.scripted_engine", model="shapes", device="cpu")
    with server:
        yield server


def watched(server: Server, since: int) -> list[str]:
    """What was done to disk and network after line *since*; the null device is no file."""
    server.get("/health/live")
    return [
        line
        for line in server.lines[since:]
        if line.startswith("WATCH") and "/dev/null" not in line
    ]


@slow
@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x", "a\\0b", "C:\\\\x", "..%2f..%2fx", "a" * 3000, "con", "x\ny"]
)
def test_a_file_name_never_becomes_a_path(watched_service, name) -> None:
    """CVE-2026-7302, CVE-2026-24486: the upload works or is refused, and no process of the
    service opens, makes or renames a file."""
    since = len(watched_service.lines)
    image = saved(picture("smooth").resize((128, 128)), "PNG")
    body, kind = form({"prompt": "x", "size": "128x128"}, [("image", name, image)])
    status, _, _ = watched_service.request("POST", "/v1/images/edits", body, content_type=kind)

    assert status in {200, 400}
    assert watched(watched_service, since) == []


@slow
@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "hub:org/repo", "shapes/../x", "http://127.0.0.1/m"]
)
def test_a_model_name_is_a_key_not_a_path(watched_service, name) -> None:
    """CVE-2024-37032: 400, asking for it 404, and neither disk nor network is touched."""
    since = len(watched_service.lines)
    status, _, body = watched_service.post("/v1/images/generations", {"prompt": "x", "model": name})
    asked, _, _ = watched_service.get(f"/v1/models/{name.replace('/', '%2F')}")

    assert (status, error_of(body)["code"], asked) == (400, "model_not_found", 404)
    assert watched(watched_service, since) == []


@slow
def test_one_socket_listens_and_the_worker_has_none(scripted_service) -> None:
    """CVE-2026-3059, CVE-2026-7301: the worker is spoken to through an inherited pipe."""
    service = psutil.Process(scripted_service.process.pid)
    listening = [
        connection.laddr.ip
        for process in (service, *service.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert listening == ["127.0.0.1"]


def test_nothing_that_runs_code_while_it_reads() -> None:
    """CVE-2025-27520: none of our modules imports or calls what can execute its input."""
    forbidden = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
    calls = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen", "numpy.load"}
    found = []
    for file in sorted((ROOT / "app").rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                names = {ast.unparse(node.func)} & calls
                shell = [word for word in node.keywords if word.arg == "shell"]
                names |= {"shell=" for word in shell if ast.unparse(word.value) != "False"}
            else:
                continue
            found += [(file.name, name) for name in names & (forbidden | calls | {"shell="})]

    assert found == []


@pytest.mark.full
@pytest.mark.torch
def test_a_pickled_checkpoint_is_refused_unread(tmp_path) -> None:
    """CVE-2025-32434: only safetensors are read; a canary in a .bin file never runs."""
    from app.engine.checkpoint.detect import open_checkpoint
    from tests.support.checkpoints import write_tiny_klein

    canary = tmp_path / "canary"
    folder = write_tiny_klein(tmp_path / "model")
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(payload)

    with pytest.raises(StartupError, match="only safetensors"):
        open_checkpoint(folder)
    assert not canary.exists()


def test_dependencies_are_above_their_floors() -> None:
    """The lock never goes below a version with a known hole."""
    locked = audit.pins(ROOT / "requirements.lock")

    assert audit.below_floors(locked) == []
    assert importlib.metadata.version("starlette") == locked["starlette"]


def test_what_is_downloaded_is_pinned_to_a_commit() -> None:
    """CVE-2026-4372: repository, commit, size and hash of every file are in the code."""
    files = [file for entry in MODELS.values() for file in entry.files]

    assert files
    for file in files:
        assert re.fullmatch(r"[0-9a-f]{40}", file.revision)
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert file.size_bytes > 0


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal"])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_config_that_brings_code_is_refused(tmp_path, part, key) -> None:
    """CVE-2026-4372, CVE-2026-5241: by the entry's name, before anything reads it."""
    from app.engine.checkpoint.detect import open_checkpoint
    from tests.support.checkpoints import write_tiny_klein

    config = write_tiny_klein(tmp_path) / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: {"AutoModel": "x.Y"}}))

    with pytest.raises(StartupError, match=key):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def canary_server() -> Iterator[tuple[str, list[str]]]:
    """A web server that nobody should ever call, and who did."""
    hits: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", hits
    server.shutdown()
    server.server_close()


@slow
@pytest.mark.parametrize(
    "url",
    [
        "http://{canary}/a.png",
        "http://ok.example\\@{canary}/a.png",
        "http://{canary}#@ok.example/",
        "http://0.0.0.0/",
        "http://[::]/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "https://{canary}/",
        "file:///etc/passwd",
        "gopher://{canary}/",
        "ftp://{canary}/a.png",
        "//{canary}/a.png",
        "data:text/html;base64,aGk=",
        "data:image/svg+xml;base64,aGk=",
        "DATA:image/png;base64,http://{canary}/",
    ],
)
def test_nothing_is_ever_fetched(watched_service, canary_server, url) -> None:
    """CVE-2026-24779 and its class: every address but a picture's data URL gets 400, and
    no process of the service opens a connection."""
    address, hits = canary_server
    since = len(watched_service.lines)
    body = {"prompt": "x", "images": [{"image_url": url.format(canary=address)}]}
    status, _, answer = watched_service.post("/v1/images/edits", body)

    assert status == 400
    assert error_of(answer)["param"] == "images[0].image_url"
    assert hits == []
    assert watched(watched_service, since) == []


@slow
def test_a_bomb_costs_neither_memory_nor_time(scripted_service) -> None:
    """169 million pixels in half a megabyte get 400 and less than 150 MB."""
    before = peak_bytes(scripted_service)
    url = "data:image/png;base64," + base64.b64encode(png_bomb()).decode()
    status, _, body = scripted_service.post(
        "/v1/images/edits", {"prompt": "x", "images": [{"image_url": url}]}
    )

    assert (status, error_of(body)["code"]) == (400, "invalid_image")
    assert peak_bytes(scripted_service) - before < 150e6


@slow
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "EPS", "DDS", "JPEG2000", "ICO"])
def test_other_formats_never_reach_a_decoder(scripted_service, kind) -> None:
    """CVE-2026-25990: told by their first bytes, whatever they are called."""
    image = saved(picture("smooth").resize((128, 128)), kind)
    body, form_type = form({"prompt": "x"}, [("image", "a.png", image)])
    status, _, answer = scripted_service.request(
        "POST", "/v1/images/edits", body, content_type=form_type
    )

    assert (status, error_of(answer)["code"]) == (400, "invalid_image")


ODD = [
    *(
        {"size": size}
        for size in ("0x0", "1x1", "129x128", "99999x99999", "-128x128", "128x128000")
    ),
    *({"size": size} for size in (128, ["128x128"], "NaNxNaN", "1e3x1e3")),
    *({"n": n} for n in (0, -1, 10**9, 1.5, "2", True, [1], 2**70)),
    *({"steps": steps} for steps in (0, -1, 10**9, 1e300, "4")),
    *({"seed": seed} for seed in (2**64, -2, 0.5, "0", 2**53)),
    *({"guidance_scale": scale} for scale in (1e308, -1, "1", 10**400)),
    *({"prompt": prompt} for prompt in ("", " \n", 7, ["x"], None, "a" * 1_000_000)),
    {"prompt": "\ud800" * 100_000},
    {"output_compression": 101, "output_format": "jpeg"},
    {"partial_images": 10**9, "stream": True},
    {"__proto__": 1},
    *(
        {"loras": loras}
        for loras in (
            [{"name": "../../etc/passwd"}],
            [{"name": "a", "scale": 10**400}],
            [{"name": "a" * 100_000}],
            [{}] * 100_000,
            {"name": "a"},
        )
    ),
    {"model": "../../../etc/passwd"},
    {"width": 2**31, "height": 2**31},
]


BROKEN = (
    b'{"prompt":"x","seed":NaN}',
    b'{"prompt":"x","guidance_scale":Infinity}',
    b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"prompt":"\xff"}',
    b"null",
    b'{"prompt":"x"',
)


@slow
def test_odd_values_are_refused_before_the_card(scripted_service) -> None:
    """CVE-2026-22773: 4xx each, in the form of every error, and the worker is the same."""
    pid = scripted_service.worker_pid()
    for odd in ODD:
        status, _, body = scripted_service.post("/v1/images/generations", {"prompt": "x"} | odd)
        assert 400 <= status < 500, (odd, status)
        error_of(body)
    for raw in BROKEN:
        status, _, body = scripted_service.request(
            "POST", "/v1/images/generations", raw, content_type="application/json"
        )
        assert status == 400
        error_of(body)

    assert scripted_service.worker_pid() == pid


def test_the_routes_are_these_and_no_others() -> None:
    """CVE-2023-48022 and its class: nothing loads, reloads, stops or executes. A new route
    has to be added to this list by hand."""
    app = create_app(Settings.read({}), lambda settings: FakeRuntime())
    found = {
        f"{method} {route.path}"
        for route in _routes(app.routes)
        for method in route.methods - {"HEAD"}
    }

    assert found == ROUTES


def test_the_docs_can_be_turned_off() -> None:
    """What describes the service is not there then."""
    app = create_app(Settings.read({"KLEIN_DOCS": "false"}), lambda settings: FakeRuntime())

    assert {route.path for route in _routes(app.routes)}.isdisjoint({"/docs", "/openapi.json"})


def _routes(routes) -> Iterator[APIRoute]:
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        else:
            inner = getattr(route, "original_router", None) or route
            yield from _routes(inner.routes)


CANARY = "Canary-Prompt-Zebra"


@slow
def test_prompts_keys_and_pictures_are_nowhere(scripted) -> None:
    """After a picture, out of memory, a failure, a library's error with the prompt in its
    text, a dead worker, a wrong key and bad requests: in no log line, metric or picture. Each of
    them was answered as such, and has its line."""
    script = ("oom@2", "fail@3", "leak@4", "exit@5")
    told_in = {"log_format": "json", "log_level": "debug", "png_metadata": "false"}
    server = scripted(*script, api_keys=KEY, **told_in)
    server.wait_until_ready()
    small = {"prompt": CANARY, "width": 128, "height": 128, "seed": 1}
    image = base64.b64encode(CANARY.encode()).decode()
    url = f"data:image/png;base64,{image}"
    asked: list[int] = []

    def ask(method: str, path: str, body: object = None, key: str = KEY) -> bytes:
        status, _, answer = server.request(
            method,
            path,
            None if body is None else json.dumps(body).encode(),
            content_type="application/json",
            authorization=f"Bearer {key}",
            x_request_id=f"canary-{len(asked)}",
        )
        asked.append(status)
        return answer

    for _ in range(5):
        ask("POST", "/generate", small)
    wait_until(lambda: server.get("/health/ready")[0] == 200)
    made = ask("POST", "/generate", small)
    ask("POST", "/generate", small, key=f"wrong-{CANARY}")
    openai = {"prompt": CANARY, "user": CANARY}
    ask("POST", "/v1/images/generations", {**openai, "model": CANARY})
    ask("POST", "/v1/images/generations", {**openai, "n": CANARY})
    ask("POST", "/v1/images/generations", {**openai, "output_format": CANARY})
    ask("GET", f"/{CANARY}?{CANARY}={CANARY}")
    ask("GET", f"/v1/models/{CANARY}")
    ask("POST", "/v1/images/edits", {"prompt": CANARY, "images": [{"image_url": url}]})
    metrics = ask("GET", "/metrics").decode()
    server.wait_for(rf'"status".*"canary-{len(asked) - 1}"')
    server.wait_for("a library could not make sense of")  # the worker's line has its own way
    lines = [json.loads(line) for line in server.lines if '"request_id": "canary-' in line]
    told = {line["request_id"]: line["status"] for line in lines if "status" in line}

    assert asked == [200, 500, 500, 500, 500, 200, 401, 400, 400, 400, 404, 404, 400, 200]
    assert told == {f"canary-{number}": status for number, status in enumerate(asked)}
    assert "a library could not make sense of" in server.log
    for hidden in (CANARY, KEY, image):
        assert hidden not in server.log
        assert hidden not in metrics
        assert hidden.encode() not in made


MARK = "zebra-field"
FORGED_NAMES = [
    f"{MARK} status=200 outcome=ok",
    f'{MARK}" status=200 outcome="ok',
    f'{MARK}\\" status=200',
    f"{MARK}\\",
    f"{MARK}=status=200",
    f"{MARK}\tstatus=200",
    f"{MARK}\u2028status=200",
    f"{MARK}\x1b[2K\rstatus=200",
    f"{MARK}\u202estatus=200",
    f"status=200 {MARK}",
    f"{MARK}" + "x" * 3000,
    f"{MARK}" + " status=200" * 300,
    MARK,
]
PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]+)(?: |$)')


def pairs_of(line: str) -> dict[str, str]:
    """The pairs after the sentence of a line, which hold all of it, each name once."""
    rest = line.partition(" was answered. ")[2]
    found = {}
    while rest:
        match = PAIR.match(rest)
        assert match, (rest, line)
        assert match[1] not in found, line
        found[match[1]] = json.loads(match[2]) if match[2].startswith('"') else match[2]
        rest = rest[match.end() :]
    return found


@slow
def test_a_callers_words_forge_no_pair(scripted_service, locked_service) -> None:
    """The name of an unknown field is quoted where it could be taken for more, has at most
    64 characters, and stands there once; in both formats."""
    for number, name in enumerate(FORGED_NAMES):
        body = {"prompt": "x", name: 1}
        for server in (scripted_service, locked_service):
            headers = {"api_key": KEY, "x_request_id": f"forged-{number}"}
            status, _, answer = server.post("/v1/images/generations", body, **headers)
            assert (status, error_of(answer)["code"]) == (400, "unknown_parameter")
            server.wait_for(rf"forged-{number}\b")
    texts = [line for line in scripted_service.lines if "forged-" in line]
    objects = [line for line in locked_service.lines if '"forged-' in line]
    told = [pairs_of(line) for line in texts] + [json.loads(line) for line in objects]

    assert len(texts) == len(objects) == len(FORGED_NAMES)
    for line, pairs in zip(texts + objects, told, strict=True):
        assert (str(pairs["status"]), pairs["outcome"]) == ("400", "invalid")
        assert line.isprintable()
        assert line.count(MARK) == 1
        assert MARK in pairs["param"]
        assert len(pairs["param"]) <= 64


@slow
def test_each_request_has_one_line_of_json(locked_service) -> None:
    """JSON logs: id, outcome and stage times of each request, in one object."""
    key = {"authorization": f"Bearer {KEY}"}
    small = {"prompt": "x", "width": 128, "height": 128}
    wait_until(lambda: locked_service.get("/health/ready")[0] == 200)
    for identity in ("json-line-1", "json-line-2"):
        locked_service.post("/generate", small, x_request_id=identity, **key)
    locked_service.post("/generate", {}, x_request_id="json-line-3", **key)
    locked_service.wait_for(r"json-line-3")
    lines = [json.loads(line) for line in locked_service.lines if line.startswith("{")]
    lines = [line for line in lines if str(line.get("request_id", "")).startswith("json-line")]
    # The worker's own lines name the request too.
    lines = [line for line in lines if line["logger"] != "app.worker.child"]
    good = [line for line in lines if line.get("outcome") == "ok"]

    assert [line["request_id"] for line in lines] == ["json-line-1", "json-line-2", "json-line-3"]
    assert lines[2]["outcome"] == "invalid"
    assert good
    for line in good:
        assert line["images"] == 1
        for stage in ("queue", "text", "denoise", "decode", "encode", "total"):
            assert line[f"{stage}_s"] >= 0


@slow
def test_a_callers_line_break_forges_no_line(scripted_service) -> None:
    """An id with CR and LF, whole or encoded, is replaced; a path or a field's name is not
    repeated."""
    forged = "2026-01-01T00:00:00.000Z error   FORGED"
    for name in ("x-request-id", "x-stainless-retry-count", "user-agent"):
        send_raw(
            scripted_service,
            f"GET /%0a{forged.replace(' ', '%20')} HTTP/1.1\r\nHost: localhost\r\n"
            f"Connection: close\r\n{name}: a\n{forged}\r\n\r\n".encode(),
        )
    scripted_service.post("/generate", {"prompt": "x", f"\r\n{forged}": 1})
    scripted_service.post("/generate", {"prompt": "x", "output_format": f"\r\n{forged}"})
    scripted_service.get("/health/live", x_request_id="after-the-forgery")
    scripted_service.wait_for("after-the-forgery")

    assert not [line for line in scripted_service.lines if line.startswith(forged[:20])]


@slow
@pytest.mark.parametrize("path", ["/", "/static/playground.js", "/nowhere", "/docs"])
def test_pages_run_no_foreign_code(scripted_service, path) -> None:
    """The policy lets nothing in from elsewhere, and no type is guessed."""
    _, headers, _ = scripted_service.get(path)

    assert headers["x-content-type-options"] == "nosniff"
    assert re.search(r"default-src '(self|none)'", headers["content-security-policy"])
    assert "unsafe-eval" not in headers["content-security-policy"]
    assert "script-src 'unsafe-inline'" not in headers["content-security-policy"]


@slow
def test_a_client_above_its_rate_is_told_when_to_come_again() -> None:
    """429 with Retry-After and OpenAI's words, per key; n counts as n images."""
    with Server(
        module="tests.support.scripted_engine",
        model="shapes",
        device="cpu",
        api_keys=f"{KEY},second-key-5678",
        rate_limit_per_minute=4,
    ) as server:
        body = {"prompt": "x", "n": 3, "size": "128x128"}
        first = server.post("/v1/images/generations", body, api_key=KEY)[0]
        status, headers, answer = server.post("/v1/images/generations", body, api_key=KEY)
        other = server.post("/v1/images/generations", body, api_key="second-key-5678")[0]
        never = server.post("/v1/images/generations", body | {"n": 5}, api_key=KEY)[0]

        assert (first, status, other, never) == (200, 429, 200, 400)
        assert 1 <= int(headers["retry-after"]) <= 60
        assert error_of(answer)["code"] == "rate_limit_exceeded"
        assert server.metric("klein_requests_rejected_total", reason="rate_limit") == 1


@slow
def test_nobody_gets_a_second_share_by_x_forwarded_for(scripted) -> None:
    """On the real server, from 127.0.0.1, which uvicorn itself would believe: an address that a
    header names counts for nothing, since that peer was not declared."""
    server = scripted(rate_limit_per_minute=1, trusted_proxies="10.0.0.0/8")
    server.wait_until_ready()
    body = {"prompt": "x", "width": 128, "height": 128}
    statuses = [
        server.post("/generate", body, x_forwarded_for=address)[0]
        for address in ("203.0.113.9", "203.0.113.10", "10.0.0.1")
    ]
    server.wait_for("name it in KLEIN_TRUSTED_PROXIES", timeout_s=5)

    assert statuses == [200, 429, 429]


@slow
def test_nothing_outlives_the_service() -> None:
    """`kill -9` of the service: the worker sees its pipe close and leaves the card."""
    with Server(module="tests.support.scripted_engine", model="shapes", device="cpu") as server:
        worker = psutil.Process(server.worker_pid())
        os.kill(server.process.pid, 9)
        server.wait()

        assert worker.wait(timeout=10) in {0, None}


def test_secrets_stand_in_no_file() -> None:
    """No key, token or private key in what is published."""
    pattern = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|BEGIN [A-Z ]*PRIVATE KEY")
    found = [
        path
        for folder in ("app", "docker", "docs", "tools")
        for path in Path(ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".sh", ".json", ".js"}
        if pattern.search(path.read_text(errors="ignore"))
    ]

    assert found == []
