"""A real Chromium, headless, and visits to live services that must stay clean."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.support.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route

REBINDING = "--host-resolver-rules=MAP rebound.example 127.0.0.1"
"""A name of somebody else's that leads here."""
_MISSING = "is missing; run `make test-system`, which installs it"


class Visit:
    """One tab on the playground of *server*; `check` finds what must never happen in it."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.server = server
        self.expected: list[str] = []
        """Beginnings of console lines that the test provokes."""
        self._complaints: list[str] = []
        self._foreign: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._complaints.append(str(error)))
        page.on("request", self._on_request)
        page.goto(server.url)

    def wait_until_ready(self) -> Visit:
        """Wait until the page knows that the service is ready."""
        self.page.wait_for_selector('.status[data-state="ready"]', timeout=20_000)
        return self

    def choose(
        self, *, side: int | None = None, seed: int | None = None, **fields: object
    ) -> Visit:
        """Set the square size, the seed, and fields by their ids."""
        if side is not None:
            self.page.locator("#size-custom").check()
            self.page.fill("#width", str(side))
            self.page.fill("#height", str(side))
        if seed is not None:
            self.page.locator("#seed-fixed").check()
            self.page.fill("#seed", str(seed))
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        return self

    def offer(self, *adapters: dict[str, object], preview: bytes = b"") -> Visit:
        """Load the page anew from a service that has these adapters, all with this preview."""
        body = {"object": "list", "data": [adapter_of(**each) for each in adapters]}
        self.page.route("**/v1/loras", lambda route: route.fulfill(json=body))
        self.page.route(
            "**/v1/loras/*/preview",
            lambda route: route.fulfill(body=preview, content_type="image/png"),
        )
        with self.page.expect_response("**/v1/loras"):
            self.page.reload()
        there = "document.querySelectorAll('#adapters-list li').length"
        return self.wait_until_ready().wait_until(f"{there} === {len(adapters)}")

    def make(self, prompt: str) -> bytes:
        """Ask for a picture, wait for it, and return its file."""
        self.page.fill("#prompt", prompt)
        self.page.click("#make")
        return self.wait_for_picture()

    def wait_for_picture(self) -> bytes:
        """Wait until no picture is on its way and return the one on show."""
        self.page.wait_for_selector('#stage[aria-busy="false"]', state="attached", timeout=60_000)
        error = self.page.locator("#error")

        assert not error.is_visible(), error.inner_text()

        return self.download()

    def wait_until(self, expression: str, *, seconds: float = 15.0) -> Visit:
        """Wait until *expression* is true in the page, which is asked again and again from here.

        Playwright's `wait_for_function` asks in the page itself from the second time on, by `eval`,
        which the page's own policy refuses: it fails whenever the first answer is no.
        """
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, (
                f"after {seconds:.0f} s it is not true: {expression}"
            )

            self.page.wait_for_timeout(50)  # events go on meanwhile
        return self

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is, once it is in sight and has come to rest.

        The mouse goes where it is sent, also out of the window, in which nothing is under it.
        """
        self.page.hover(selector)
        box = self.page.locator(selector).bounding_box()

        assert box

        return dict(box)

    def download(self) -> bytes:
        """Save the picture on show as a person would."""
        with self.page.expect_download() as saving:
            self.page.click("#download")
        return saving.value.path().read_bytes()

    def upload(self, *pictures: Image.Image, name: str = "reference.png") -> Visit:
        """Pick pictures to work from."""
        before = self.page.locator("#references li").count()
        self.page.set_input_files(
            "#files",
            [{"name": name, "mimeType": "image/png", "buffer": png(one)} for one in pictures],
        )
        self.page.wait_for_selector(f"#references li:nth-child({before + len(pictures)})")
        return self

    def check(self) -> None:
        """Nothing was complained of in the console, nothing was asked of another origin."""
        assert self._foreign == []
        assert self._complaints == []

    def _on_console(self, message: ConsoleMessage) -> None:
        is_complaint = message.type in {"error", "warning", "assert"}
        if is_complaint and not any(message.text.startswith(text) for text in self.expected):
            self._complaints.append(message.text)

    def _on_request(self, request: Request) -> None:
        own = (self.server.url + "/", "blob:" + self.server.url, "data:")
        if not request.url.startswith(own):
            self._foreign.append(request.url)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of this package.

    Playwright keeps an event loop running in the main thread until it stops; before the tests of
    other packages it must have, since those start loops of their own.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail(f"playwright {_MISSING}")
    with sync_playwright() as playwright:
        # The sandbox wants a kernel that containers seldom offer; the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", REBINDING]
        )
        yield browser
        browser.close()
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


@pytest.fixture
def visit(chromium: Browser, scripted: object) -> Iterator[Callable[..., Visit]]:
    """Visits: `visit(server, width=360)`; each is checked when the test is over.

    *scripted* is named so that visits end before the scripted servers do.
    """
    visits: list[Visit] = []

    def start(server: Server, *, width: int = 1280, height: int = 900, **options: Any) -> Visit:
        size = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, locale="en-GB", **options)
        context.set_default_timeout(15_000)
        visits.append(Visit(context.new_page(), server))
        return visits[-1]

    yield start
    for one in visits:
        one.page.context.close()
    for one in visits:
        one.check()


def find_chromium() -> str:
    """The system's Chromium; the tests download no browser.

    Best is the one that has no window to draw: tabs, menus and the pages behind them take the other
    two thirds of what a visit costs a processor.
    """
    for name in ("chromium-headless-shell", "chromium", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail(f"chromium-headless-shell {_MISSING}")


def adapter_of(id: str, **more: object) -> dict[str, object]:
    """An adapter as `GET /v1/loras` lists it."""
    return {
        **{"id": id, "object": "lora", "parent": "flux.2-klein-4b", "rank": 32},
        **{"size_bytes": 92_000_000, "sha256": "0" * 64, "created": 1_760_000_000},
        **{"scale": None, "preview": None},
        **more,
    }


def answer_with(page: Page, *events: dict[str, object], comment: str = "") -> list[Request]:
    """Let requests be answered with these events for each picture; return those requests."""
    asked: list[Request] = []

    def answer(route: Route) -> None:
        asked.append(route.request)
        n = count_of(route.request)
        indexed = [{**event, "image_index": index} for index in range(n) for event in events]
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in indexed)
        route.fulfill(body=f": {comment}\n\n{stream}", content_type="text/event-stream")

    page.route(re.compile("/v1/images/(generations|edits)$"), answer)
    return asked


def count_of(request: Request) -> int:
    """How many pictures a request asks for, by its JSON or its form."""
    if "json" in request.headers["content-type"]:
        return request.post_data_json["n"]
    found = re.search(rb'name="n"\r\n\r\n(\d+)\r\n', request.post_data_buffer)

    assert found

    return int(found[1])


def encoded(image: Image.Image) -> dict[str, str]:
    """A picture as events carry it."""
    return {"b64_json": base64.b64encode(png(image)).decode(), "output_format": "png"}


def tab_to(page: Page, wanted: str, *, by: str = "id") -> None:
    """Press Tab until the focus is there; every stop on the way must show it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        now = page.evaluate(
            """() => {
                const it = document.activeElement;
                const drawn = it.type === "radio" ? it.nextElementSibling : it;
                const {outlineWidth, outlineStyle} = getComputedStyle(drawn);
                const isSeen = parseFloat(outlineWidth) >= 2 && outlineStyle !== "none";
                return {id: it.id, className: it.className, isBody: it === document.body, isSeen};
            }"""
        )

        assert now["isSeen"] or now["isBody"], f"the focus is not seen on {now}"

        if now[by] == wanted:
            return
    raise AssertionError(f"the keyboard does not reach {wanted}")


def png(image: Image.Image) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: bytes) -> Image.Image:
    """Decode a picture."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def checkerboard(side: int) -> Image.Image:
    """A picture with something to keep in every corner."""
    image = Image.new("RGB", (side, side), "#204060")
    for x in range(0, side, 8):
        for y in range(x // 8 % 2 * 8, side, 16):
            image.paste((x * 2 % 256, y * 2 % 256, 90), (x, y, x + 8, y + 8))
    return image
