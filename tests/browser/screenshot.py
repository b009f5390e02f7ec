"""Takes the picture of the playground that the README shows.

python -m tests.browser.screenshot docs/playground.png
"""

from __future__ import annotations

import sys

from playwright.sync_api import sync_playwright

from tests.browser.conftest import Visit, find_chromium
from tests.support.server import Server

# The README's own examples.
PROMPTS = (
    "a red circle left of a blue square",
    "a small green star in the top left",
    "a red circle on a blue background",
)


def take(path: str) -> None:
    """Let the demo model draw three shapes, and save what the page shows then."""
    with Server(model="shapes", device="cpu") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        # Without motion, which a browser without a card draws on the cores that the model wants.
        size = {"width": 1280, "height": 1270}
        page = browser.new_page(viewport=size, reduced_motion="reduce")
        here = Visit(page, server).wait_until_ready().choose(seed=7)
        for prompt in PROMPTS:
            here.make(prompt)
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(800)
        # As it is: a palette, chosen by area, would lose the colours of small things.
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    take(sys.argv[1])
