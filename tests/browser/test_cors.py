"""What a page of another origin gets of a service that lists it, and of one that does not."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from tests.support.server import Server

pytestmark = pytest.mark.system

KEY = "first-key-1234"

ASK = """async ([url, key, stream]) => {
    const headers = { "content-type": "application/json", "x-stainless-lang": "js" };
    if (key) headers.authorization = `Bearer ${key}`;
    const path = stream ? "/v1/images/generations" : "/generate";
    const body = stream
        ? { prompt: "a fox", size: "64x64", stream: true }
        : { prompt: "a fox", width: 64, height: 64, seed: 7 };
    try {
        const answer = await fetch(url + path, {
            method: "POST", headers, body: JSON.stringify(body),
        });
        const bytes = new Uint8Array(await answer.arrayBuffer());
        const named = ["x-request-id", "server-timing", "x-klein-seed", "x-klein-peak-vram-bytes"];
        return {
            status: answer.status,
            start: String.fromCharCode(...bytes.slice(0, 4000)),
            told: named.filter(name => answer.headers.get(name) !== null),
        };
    } catch (error) {
        return { failed: error.name };
    }
}"""

READ = """async url => {
    const asked = path => fetch(url + path).then(answer => answer.status, error => error.name);
    return [await asked("/v1/models"), await asked("/health/live")];
}"""

LINK = """async url => {
    const made = await fetch(url + "/v1/images/generations", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ prompt: "a fox", size: "64x64", response_format: "url" }),
    });
    const image = new Image();
    image.crossOrigin = "anonymous";
    image.src = (await made.json()).data[0].url;
    await image.decode();
    const canvas = new OffscreenCanvas(64, 64);
    canvas.getContext("2d").drawImage(image, 0, 0);
    return (await canvas.convertToBlob()).size > 0;
}"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """The origin of a page on a port of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(chromium, elsewhere):
    """A tab on it."""
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(elsewhere)
        yield page


def served(scripted, **settings: object) -> Server:
    """A service with klein's limits whose pictures take no time."""
    server = scripted(model="flux.2-klein-4b", **settings)
    server.wait_until_ready()
    return server


def test_an_allowed_page_asks_and_reads(page, elsewhere, scripted) -> None:
    """With its preflight: picture, headers, events, the link's pixels."""
    service = served(scripted, allowed_origins=f"http://other.example,{elsewhere}")
    plain = page.evaluate(ASK, [service.url, None, False])
    events = page.evaluate(ASK, [service.url, None, True])

    assert plain["status"] == events["status"] == 200
    assert plain["start"][1:4] == "PNG"
    assert plain["told"] == [
        "x-request-id",
        "server-timing",
        "x-klein-seed",
        "x-klein-peak-vram-bytes",
    ]
    assert "event: image_generation.completed" in events["start"]
    assert page.evaluate(READ, service.url) == [200, 200]
    assert page.evaluate(LINK, service.url) is True


def test_a_page_that_is_not_listed_gets_nothing(page, scripted) -> None:
    """The preflight fails, so the request is never sent; what needs none cannot be read."""
    service = served(scripted, allowed_origins="http://other.example")

    assert page.evaluate(ASK, [service.url, None, False]) == {"failed": "TypeError"}
    assert page.evaluate(READ, service.url) == ["TypeError", "TypeError"]
    assert service.metric("klein_images_total", mode="generate") == 0


def test_with_keys_the_preflight_needs_none_and_the_request_does(page, elsewhere, scripted) -> None:
    """A page without the key reads why it was refused."""
    service = served(scripted, allowed_origins=elsewhere, api_keys=KEY)
    refused = page.evaluate(ASK, [service.url, None, False])

    assert refused["status"] == 401
    assert "needs a valid API key" in refused["start"]
    assert page.evaluate(ASK, [service.url, KEY, False])["status"] == 200
    assert page.evaluate(READ, service.url) == [401, 200]


def test_all_origins_may_ask_with_a_key(page, scripted) -> None:
    """`KLEIN_ALLOWED_ORIGINS=*`."""
    service = served(scripted, allowed_origins="*", api_keys=KEY)

    assert page.evaluate(ASK, [service.url, KEY, False])["status"] == 200
    assert page.evaluate(ASK, [service.url, "wrong-key-0000", False])["status"] == 401


def test_a_rebound_name_is_told_in_words_and_gets_nothing(chromium, scripted) -> None:
    """A name that leads to 127.0.0.1 stays unknown, whatever its page sends to its own origin."""
    service = served(scripted)
    port = service.url.rpartition(":")[2]
    rebound = f"http://rebound.example:{port}"
    with chromium.new_context(bypass_csp=True) as context:
        page = context.new_page()
        page.goto(f"{rebound}/")
        words = page.locator("body").inner_text()
        statuses = page.evaluate(
            """async () => [
                (await fetch("/v1/models")).status,
                (await fetch("/generate", { method: "POST", body: "{}" })).status,
                (await fetch("/v1/models", { headers: { "x-forwarded-host": "localhost" } })).status
            ]"""
        )

    assert statuses == [400, 400, 400]
    assert "KLEIN_ALLOWED_HOSTS" in words
    assert "{" not in words
    assert service.metric("klein_images_total", mode="generate") == 0
