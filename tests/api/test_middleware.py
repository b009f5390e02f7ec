"""What happens to every request: id, headers, host, body limit, the line in the log."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re

import pytest
from httpx import ASGITransport

from app.errors import Kind, KleinError, StartupError
from app.settings import Settings
from tests.api.conftest import error_of
from tests.api.sockets import until

KEY = "first-key-1234"


def with_version(app, version: str):
    """The app as it sees requests of that version of HTTP."""

    async def call(scope, receive, send) -> None:
        await app({**scope, "http_version": version}, receive, send)

    return call


@pytest.mark.parametrize("path", ["/v1/models", "/nope", "/health/live", "/metrics", "/docs"])
async def test_every_answer_has_an_id_of_its_own(client, path):
    """The SDK shows it as `_request_id`, and the log has it."""
    first, second = [(await client.get(path)).headers["x-request-id"] for _ in range(2)]

    assert first != second


@pytest.mark.parametrize("asked", ["a", "trace_1.2-3", "x" * 128])
async def test_a_callers_id_is_adopted(client, asked):
    """So that a chain of services has one id."""
    response = await client.get("/v1/models", headers={"x-request-id": asked})

    assert asked == response.headers["x-request-id"]


@pytest.mark.parametrize("asked", ["", "x" * 129, "a b", "a\tb", "ü", "a;b"])
async def test_an_odd_id_is_replaced(client, asked):
    """It would travel into log lines."""
    headers = [(b"x-request-id", asked.encode("latin-1"))]
    response = await client.get("/v1/models", headers=headers)

    assert asked != response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/models", "/nope"])
async def test_every_answer_tells_its_time_and_guards_browsers(client, path):
    """Also the errors."""
    headers = (await client.get(path)).headers

    assert int(headers["openai-processing-ms"]) >= 0
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "127.0.0.1:65000",
        "127.8.8.8",
        "[::1]:8000",
        "ui.localhost:80",
        "localhost.",
    ],
)
async def test_loopback_names_are_always_known(client, host):
    """With any port."""
    assert (await client.get("/health/live", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.5.evil.example:8000",
        "10.0.0",
        "2130706433",
        "::1",
        "",
        "a b",
        "[::1",
        "localhost:port",
        "127.0.0.1/x",
        "localhost@evil.example",
    ],
)
async def test_an_unknown_host_is_refused(client, service, host):
    """A page that rebinds its name to 127.0.0.1 still says its own name, reading or asking."""
    posted = await client.post("/generate", headers={"host": host}, json={"prompt": "a"})
    read = await client.get("/v1/models", headers={"host": host})

    assert (posted.status_code, read.status_code) == (400, 400)
    assert "KLEIN_ALLOWED_HOSTS" in str(error_of(posted)["message"])
    assert not service.tickets


@pytest.mark.parametrize(
    "host",
    [
        "192.168.1.5:8000",
        "10.0.0.5",
        "203.0.113.9:80",
        "[2001:db8::7]:8000",
        "[fe80::1]",
        "0.0.0.0:8000",
        "host.docker.internal:8000",
        "Host.Containers.Internal",
    ],
)
async def test_an_address_is_no_name_that_a_page_could_rebind(client, service, host):
    """So any is known, and so are the names under which a container reaches its host."""
    response = await client.post("/generate", headers={"host": host}, json={"prompt": "a"})

    assert response.status_code == 200
    assert len(service.tickets) == 1


@pytest.mark.parametrize(("version", "status"), [("1.0", 200), ("1.1", 400)])
async def test_a_request_without_host_is_of_http_1_0(client, version, status):
    """HAProxy's checks send none; HTTP/1.1 demands one (RFC 9112 3.2)."""
    transport = client._transport
    client._transport = ASGITransport(app=with_version(transport.app, version))
    request = client.build_request("GET", "/v1/models")
    del request.headers["host"]

    assert (await client.send(request)).status_code == status


@pytest.mark.parametrize("host", ["gpu.lan:8000", "evil.example", "klein_upstream"])
async def test_probes_and_scrapes_need_no_known_name(client, host):
    """They come under whatever name a cluster has; what else is there stays closed."""
    for path in ("/health/live", "/health/ready", "/metrics", "/metrics/", "//health/live"):
        url = f"http://127.0.0.1:8000{path}"
        assert (await client.get(url, headers={"host": host})).status_code == 200
    for path in ("/health", "/healthy", "/v1/models", "/", "/metricsx"):
        assert (await client.get(path, headers={"host": host})).status_code == 400


async def test_a_host_that_is_none_is_refused_everywhere(client):
    """Two of them, or what is no name, also from a probe."""
    for host in ("a b", "x?", "x#", "localhost:99999", "[::::]", "[1.2.3]"):
        assert (await client.get("/health/live", headers={"host": host})).status_code == 400
    twice = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert (await client.get("/health/live", headers=twice)).status_code == 400


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"


async def test_a_browser_is_told_in_words(client):
    """Whoever types a name into a browser gets a page that says what to do, not JSON."""
    headers = {"host": "gpu.lan", "accept": BROWSER}
    response = await client.get("/", headers=headers)

    assert response.status_code == 400
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "<code>KLEIN_ALLOWED_HOSTS</code>" in response.text
    assert "IP address" in response.text
    assert "gpu.lan" not in response.text


async def test_its_reader_learns_who_can_change_that(serve):
    """The page may be read on another device of the house: which setting, where, and by whom."""
    client = await serve(api_keys=(KEY,))
    named = await client.get("/", headers={"host": "gpu.lan", "accept": BROWSER})
    keyless = await client.get("/health", headers={"accept": BROWSER})

    assert "on the machine that it runs on" in named.text
    assert "show them this page" in named.text
    assert "<code>KLEIN_API_KEYS_FILE</code>" in keyless.text
    assert "ask them for one" in keyless.text


@pytest.mark.parametrize(
    ("headers", "setting", "status"),
    [
        ({"host": "gpu.lan"}, "KLEIN_ALLOWED_HOSTS", 400),
        ({"origin": "http://other.lan:8000"}, "KLEIN_ALLOWED_ORIGINS", 403),
        ({"origin": "null"}, "KLEIN_ALLOWED_ORIGINS", 403),
        ({"sec-fetch-site": "cross-site"}, "KLEIN_ALLOWED_ORIGINS", 403),
    ],
    ids=str,
)
async def test_a_browser_that_sends_a_form_is_told_in_words_too(
    client, service, headers, setting, status
):
    """A refused name or origin; a page's own requests ask for no HTML and get JSON."""
    form = {"prompt": "a"}
    page = await client.post("/generate", data=form, headers=headers | {"accept": BROWSER})
    data = await client.post("/generate", data=form, headers=headers | {"accept": "*/*"})

    assert (page.status_code, data.status_code) == (status, status)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert f"<code>{setting}</code>" in page.text
    assert "show them this page" in page.text
    assert "<script" not in page.text
    assert "other.lan" not in page.text
    assert setting in str(error_of(data)["message"])
    assert not service.tickets


async def test_a_browser_without_a_key_is_asked_for_it(serve):
    """401 with what to send and a form; the policy lets the form's own script run, no other."""
    client = await serve(api_keys=(KEY,))
    response = await client.get("/docs", headers={"accept": BROWSER})
    (script,) = re.findall(r"<script>(.*?)</script>", response.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = response.headers["content-security-policy"]

    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert "<code>Authorization: Bearer &lt;key&gt;</code>" in response.text
    assert "<input type=password" in response.text
    assert f"script-src 'sha256-{digest}'" in policy
    assert {"default-src 'none'", "connect-src 'self'"} <= set(policy.split("; "))
    assert KEY not in response.text


async def test_a_browser_that_needs_no_key_is_asked_for_none(client):
    """Another error's page has no form and no script."""
    response = await client.get("/", headers={"host": "gpu.lan", "accept": BROWSER})

    assert "<form" not in response.text
    assert "<script" not in response.text


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "", JAVA, "application/json, text/html;q=0.5"]
)
async def test_a_program_is_told_in_json(client, accept):
    """Java's HttpURLConnection asks for HTML by default and wants none."""
    response = await client.get("/v1/models", headers={"host": "gpu.lan", "accept": accept})

    assert error_of(response)["message"]


async def test_the_operators_names_are_known(serve):
    """Those of `KLEIN_ALLOWED_HOSTS`, in any case, with any port."""
    client = await serve(allowed_hosts=("klein", "Pictures.Example"))
    for host in ("klein:8000", "KLEIN", "pictures.example"):
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
    assert (await client.get("/v1/models", headers={"host": "other"})).status_code == 400


@pytest.mark.parametrize(
    "value", ["http://gpu.lan", "gpu.lan:8000", "gpu.lan/", "*.lan", "gpu.lan,a b"]
)
def test_what_no_client_sends_as_a_name_ends_the_start(value):
    """It would never match, and be found out much later."""
    with pytest.raises(StartupError, match=r"KLEIN_ALLOWED_HOSTS .*is no name"):
        Settings.read({"KLEIN_ALLOWED_HOSTS": value})


def test_names_of_all_kinds_are_taken():
    """Addresses, which need none, and the empty end of a list too."""
    given = "klein,gpu_1.lan.,192.0.2.1,[::1],*,"

    assert len(Settings.read({"KLEIN_ALLOWED_HOSTS": given}).allowed_hosts) == 5


async def test_the_address_that_was_bound_is_known(serve):
    """Whoever sets KLEIN_HOST to one name means to be called by it."""
    client = await serve(host="gpu.lan", trust_network=True)
    other = await serve(host="0.0.0.0", trust_network=True)

    assert (await client.get("/v1/models", headers={"host": "gpu.lan:8000"})).status_code == 200
    assert (await other.get("/v1/models", headers={"host": "gpu.lan:8000"})).status_code == 400


async def test_a_key_makes_any_host_good(serve):
    """A page that rebinds its name does not have it; without configured keys nothing counts."""
    headers = {"host": "gpu.example", "api-key": KEY}
    with_keys = await serve(api_keys=(KEY,))
    without = await serve()

    assert (await with_keys.get("/v1/models", headers=headers)).status_code == 200
    assert (await without.get("/v1/models", headers=headers)).status_code == 400


async def test_a_body_that_says_it_is_too_large_is_not_read(serve):
    """413 by Content-Length, before a byte has come."""
    client = await serve(max_body_bytes=2000)
    pulled = []

    async def body():
        pulled.append(1)
        yield b"x" * 3000

    headers = {"content-length": "3000", "content-type": "application/json"}
    response = await client.post("/generate", content=body(), headers=headers)

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert not pulled


async def test_a_chunked_body_is_counted(serve):
    """413 before its end, which might never come."""
    client = await serve(max_body_bytes=2000)
    pulled = []

    async def endless():
        while True:
            pulled.append(1)
            yield b"x" * 500

    response = await client.post(
        "/generate", content=endless(), headers={"content-type": "application/json"}
    )

    assert response.status_code == 413
    assert len(pulled) == 5


async def test_a_full_queue_comes_before_a_large_body(serve, service):
    """Whoever cannot be served now need not send it first."""
    client = await serve(max_body_bytes=2000)
    service.closed_by = Kind.DRAINING
    headers = {"content-type": "application/json"}
    response = await client.post("/generate", content=b"x" * 5000, headers=headers)

    assert response.status_code == 503


async def test_bodies_are_limited_together_while_they_are_held(serve, service):
    """Those being read count; one whose picture waits was let go of."""
    keys = ("first-key-1234", "second-key-5678")
    client = await serve(max_body_bytes=200_000, api_keys=keys)
    service.script.release = asyncio.Event()
    body = json.dumps({"prompt": "a"}).encode().ljust(190_000)
    headers = [{"content-type": "application/json", "api-key": key} for key in keys]
    waiting = []
    for number in range(20):
        asked = client.post("/generate", content=body, headers=headers[number % 2])
        waiting.append(asyncio.create_task(asked))
        # Only when this one waits for its picture is its body let go of.
        await until(lambda: len(service.tickets) == len(waiting))
    more = asyncio.Event()

    async def half():
        yield body[:189_000]
        await more.wait()
        yield body[189_000:]

    reading = [
        asyncio.create_task(client.post("/generate", content=half(), headers=headers[number % 2]))
        for number in range(9)
    ]
    refused, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED, timeout=5)
    more.set()
    service.script.release.set()
    statuses = [(await task).status_code for task in [*waiting, *reading]]

    assert [(await task).status_code for task in refused] == [503]
    assert statuses.count(200) == 28


async def test_the_log_has_one_line_and_no_secrets(serve, service, caplog):
    """Route, status, outcome and time; never prompt, key or user."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    client = await serve(api_keys=(KEY,))
    service.script.error = KleinError("It failed.", kind=Kind.OUT_OF_MEMORY)
    for body in (
        {"prompt": "canary", "user": "canary", "safety_identifier": "canary"},
        {"prompt": "canary", "n": 0, "model": "canary"},
        {"prompt": 7, "negative_prompt": "canary"},
    ):
        headers = {"api-key": KEY, "x-stainless-retry-count": "2"}
        await client.post("/v1/images/generations", json=body, headers=headers)
    records = [record for record in caplog.records if record.name == "app.api.access"]

    assert [(record.status, record.outcome, record.retry) for record in records] == [
        (500, "oom", 2),
        (400, "invalid", 2),
        (400, "invalid", 2),
    ]
    for record in records:
        assert "canary" not in str(vars(record))
        assert KEY not in str(vars(record))


async def test_unknown_addresses_are_counted_under_one_name(client, runtime):
    """A label never holds what a caller made up."""
    for path in ("/a", "/b?x=1", "/v1/images/variations"):
        await client.get(path)

    assert {("unmatched", "invalid")} == set(runtime.metrics.finished)


async def test_the_lifespan_starts_and_closes_what_it_built(serve, runtime):
    """In this order, once each."""
    await serve()

    assert runtime.calls == ["start"]
