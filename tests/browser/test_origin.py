"""What a page on another port tries with the card, in a real browser; it comes to nothing."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.server import Server

pytestmark = pytest.mark.system

PAGE = """<!doctype html><title>elsewhere</title>
<iframe name="away"></iframe>
<form id="form" method="post" enctype="multipart/form-data" target="away"
      action="{url}/v1/images/edits">
  <input name="prompt" value="a form"><input type="file" name="image" id="file">
</form>
<form id="plain" method="post" enctype="text/plain" target="away" action="{url}/generate">
  <input name='{{"prompt": "a form", "x": "' value='"}}'>
</form>"""

ATTACK = """async url => {
    const canvas = new OffscreenCanvas(64, 64);
    canvas.getContext("2d").fillRect(0, 0, 64, 64);
    const image = await canvas.convertToBlob();
    const body = () => {
        const form = new FormData();
        form.append("prompt", "a page elsewhere");
        form.append("image", image, "a.png");
        return form;
    };
    const send = (path, body) =>
        fetch(url + path, { method: "POST", mode: "no-cors", body })
            .then(answer => answer.type, error => String(error));
    const types = [
        await send("/v1/images/edits", body()),
        await send("/v1/images/edits", body()),
        await send("/v1/images/generations", '{"prompt": "a page elsewhere"}'),
    ];
    navigator.sendBeacon(url + "/v1/images/edits", body());
    const files = new DataTransfer();
    files.items.add(new File([image], "a.png", { type: "image/png" }));
    document.getElementById("file").files = files.files;
    for (const name of ["form", "plain"]) {
        const loaded = new Promise(
            done => document.querySelector("iframe").addEventListener("load", done, { once: true })
        );
        document.getElementById(name).submit();
        await loaded;
    }
    return types;
}"""


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    """A service without keys, as most people run it at home."""
    with Server(
        module="tests.support.scripted_engine", model="flux.2-klein-4b", device="cpu"
    ) as server:
        yield server


@pytest.fixture(params=["127.0.0.1", "localhost"])
def elsewhere(request, service) -> Iterator[str]:
    """The address of a page on another port: the same site to a browser, or another one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE.format(url=service.url).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{request.param}:{server.server_port}/"
        server.shutdown()


def test_a_page_elsewhere_makes_no_picture(chromium, service, elsewhere) -> None:
    """`fetch` without CORS, a beacon and two forms: all of them arrive, each is refused, and not
    one picture is made."""
    before = service.metric("klein_images_total", mode="edit")
    refused = refusals(service)
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(elsewhere)
        types = page.evaluate(ATTACK, service.url)
        wait_until(lambda: refusals(service) >= refused + 6)

    made = service.metric("klein_images_total", mode="edit") - before
    assert (made, service.metric("klein_images_total", mode="generate")) == (0, 0)
    assert types == ["opaque"] * 3
    assert refusals(service) == refused + 6


def test_the_services_own_page_still_does(visit, service) -> None:
    """Its own origin is not refused; see test_playground.py for all that it does."""
    here = visit(service).wait_until_ready().choose(side=64)
    here.make("a fox")

    assert service.metric("klein_images_total", mode="generate") == 1


def refusals(service: Server) -> float:
    """How often an origin was refused, on all routes."""
    return service.metric("klein_requests_total", outcome="unauthorized")


def wait_until(holds, *, timeout_s: float = 10.0) -> None:
    """Ask again until it holds or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
