"""What a browser shows that has no key: a page that asks for it, and then what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.system

KEY = "first-key-1234"


@pytest.fixture
def server(scripted) -> Server:
    """A service with keys."""
    started = scripted(api_keys=KEY)
    started.wait_until_ready()
    return started


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Page]:
    """A tab, in which no script may fail and no policy be broken."""
    context = chromium.new_context()
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda line: complaints.append(line.text))
    yield tab
    context.close()

    assert [line for line in complaints if "status of 401" not in line] == []


def test_the_page_asks_for_the_key_and_shows_the_docs(page, server) -> None:
    """A wrong key is told, the right one opens them; the tab remembers it, no address has it."""
    page.goto(f"{server.url}/docs")
    page.fill("input", "another-key-5678")
    page.press("input", "Enter")
    page.wait_for_selector("output:text('does not know this key')")
    page.fill("input", KEY)
    page.click("button")
    page.wait_for_selector("h2:has-text('POST /generate')")

    assert page.url == f"{server.url}/docs"
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert page.locator("form").count() == 0

    page.click("a[href='/openapi.json']")
    page.wait_for_selector("pre")

    assert page.inner_text("pre").startswith('{"openapi":')


def test_a_key_given_to_the_page_at_the_root_opens_the_docs(page, server) -> None:
    """It is asked for once in a tab."""
    page.goto(server.url)
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector('.status[data-state="ready"]')
    page.goto(f"{server.url}/docs")

    page.wait_for_selector("h2:has-text('POST /generate')")
