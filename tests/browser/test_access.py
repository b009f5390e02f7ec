"""For everybody: axe on every state of the page, phones, nothing that jumps, few bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import adapter_of, answer_with, checkerboard, encoded
from tests.browser.test_recipes import PARAMETERS, drop, png_with

if TYPE_CHECKING:
    from tests.browser.conftest import Visit
    from tests.support.server import Server

pytestmark = pytest.mark.system

DONE = {"type": "image_generation.completed", "seed": 7, "size": "64x64"}
RULES = ["wcag2a", "wcag2aa", "wcag2aaa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MOST_BYTES = 150_000
REFUSED = "Failed to load resource: the server responded with a status of"


@pytest.fixture
def violations() -> Callable[[Visit], list[str]]:
    """What axe has against the page as it is, contrast of 7:1 included."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    enhanced = {"rules": {"color-contrast-enhanced": {"enabled": True}}}
    options = {
        "runOnly": {"type": "tag", "values": RULES},
        "resultTypes": ["violations"],
        **enhanced,
    }

    def run(here: Visit) -> list[str]:
        here.page.wait_for_timeout(300)  # colours change over a moment
        found = axe.run(here.page, options=options).response["violations"]
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in found
            for node in each["nodes"]
        ]

    return run


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark"), (768, "dark")])
def test_axe_finds_nothing_on_any_state(visit, klein, violations, width, scheme) -> None:
    """From the empty page to each of its dialogs."""
    here = visit(klein, width=width, color_scheme=scheme)
    here.expected = [REFUSED]
    seen = {}
    pretend(here, klein, devices=3)
    here.page.evaluate("for (const it of document.querySelectorAll('details')) it.open = true")
    seen["empty"] = violations(here)
    here.page.click("#make")
    seen["error"] = violations(here)
    here.upload(checkerboard(64))
    here.page.check("[id='adapter:ink']")
    answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    here.page.fill("#count", "3")
    here.make("a lamp")
    here.page.click("#favourite")
    seen["done"] = violations(here)
    here.page.click("#before")
    here.page.wait_for_selector("#split")
    here.page.click("#delete")
    seen["compared and deleted"] = violations(here)
    here.page.click("#zoom")
    seen["zoomed"] = violations(here)
    here.page.click("#zoom")
    error = {"message": "The queue is full.", "code": "queue_full"}
    here.page.route(
        "**/edits",
        lambda it: it.fulfill(status=503, headers={"retry-after": "60"}, json={"error": error}),
    )
    for _ in range(2):
        here.page.click("#make")
    here.page.wait_for_selector("#waiting-list li:nth-child(2)")
    seen["waiting"] = violations(here)
    for dialog, opener in (("mask", "button.mask"), ("extend", "button.extend"), ("help", "#help")):
        here.page.click(opener)
        here.page.wait_for_selector(f"#{dialog}-dialog[open]")
        seen[dialog] = violations(here)
        if dialog == "mask":
            here.page.click("#mask-canvas")
            here.page.keyboard.press("Escape")
            seen["mask ask"] = violations(here)
            here.page.click("#mask-discard")
        else:
            here.page.keyboard.press("Escape")
    drop(here, png_with(parameters=PARAMETERS), "png")
    here.page.wait_for_selector("#found-dialog[open]")
    seen["found"] = violations(here)

    assert {state: found for state, found in seen.items() if found} == {}


def test_axe_finds_nothing_where_a_key_is_asked_for(visit, scripted, violations) -> None:
    """The first thing that a guest sees."""
    server = scripted(api_keys="a-key-for-the-test")
    server.wait_until_ready()
    here = visit(server)
    here.expected = [REFUSED]
    here.page.wait_for_selector("#key")

    assert violations(here) == []


def test_the_page_is_small(visit, klein) -> None:
    """All that it loads, page, sheet, scripts and icon: the bytes of the bodies as they are sent,
    each file once, none compressed. The network's page and its script are another page; pictures,
    the list of adapters and what `/health` says are the service's.
    """
    here = visit(klein)
    loaded = {"/"}
    here.page.on("request", lambda it: loaded.add(it.url.removeprefix(klein.url)))
    here.page.reload()
    here.wait_until_ready()
    sent = [klein.get(path) for path in loaded if path == "/" or "/static/" in path]

    assert len(sent) > 20
    assert all("content-encoding" not in headers for _, headers, _ in sent)
    assert sum(len(body) for *_, body in sent) < MOST_BYTES


def test_nothing_jumps(visit, scripted) -> None:
    """Neither while the page is loaded, with a history or without, nor while a picture is made, or
    several: at the size that is chosen first, with previews.
    """
    server = scripted("slow=1", "previews=1", model="flux.2-klein-4b")
    server.wait_until_ready()
    here = visit(server)
    here.page.add_init_script(
        """window.jumps = [];
        new PerformanceObserver((list) => {
            for (const it of list.getEntries()) if (!it.hadRecentInput) window.jumps.push(
                [it.value, ...it.sources.map(({node}) => node?.id || node?.className || "?")]);
        }).observe({type: "layout-shift", buffered: true});
        window.shown = [];
        addEventListener("DOMContentLoaded", () => {
            const image = document.getElementById("picture");
            new MutationObserver(() => window.shown.push(image.alt))
                .observe(image, {attributes: true, attributeFilter: ["src", "alt"]});
        });"""
    )
    for prompt, count in (("a lamp", 1), ("another", 2)):
        here.page.reload()
        here.wait_until_ready().choose(steps=4, count=count).make(prompt)
        here.page.wait_for_timeout(600)
        jumps = here.page.evaluate("window.jumps")

        assert sum(value for value, *_ in jumps) < 0.02, jumps
        assert "A preview of the picture on its way" in here.page.evaluate("window.shown")


def test_on_a_phone_the_buttons_are_within_reach(visit, scripted) -> None:
    """Make and Cancel stay at the lower edge, wherever the page is; the key's field folds away."""
    server = scripted("slow=2", api_keys="a-key-for-the-test")
    server.wait_until_ready()
    here = visit(server, width=360, height=640)
    here.expected = [f"{REFUSED} 401"]
    here.page.fill("#key", "a-key-for-the-test")
    here.page.press("#key", "Enter")
    here.wait_until_ready()

    assert not here.page.is_visible("#key-form")

    here.page.fill("#prompt", "a lamp")
    here.page.click("#make")
    for top in (0, 99999):
        here.page.evaluate("(top) => scrollTo(0, top)", top)
        box = here.page.locator("#cancel").bounding_box()
        assert 0 < box["y"] < 640 - box["height"]
        assert box["height"] >= 40
    here.page.click("#cancel")
    here.page.wait_for_selector('#stage[aria-busy="false"]', state="attached")


def test_an_error_stands_at_its_field_and_offers_the_fix(visit, klein) -> None:
    """A size between the steps, and a number beyond its limit."""
    here = visit(klein, width=360).wait_until_ready()
    here.expected = [f"{REFUSED} 400"]
    here.page.fill("#prompt", "a cat")
    here.page.click("#settings summary")
    here.page.check("#size-custom")
    here.page.fill("#width", "300")
    here.page.fill("#height", "250")
    here.page.click("#make")
    here.page.click("button.fix:text('Use 304 × 256')")

    assert here.page.input_value("#width") == "304"
    assert here.page.input_value("#height") == "256"
    assert not here.page.is_visible("#error")

    here.page.fill("#count", "12")
    here.page.click("#make")
    field, error = (here.page.locator(it).bounding_box() for it in ("#count", "#error"))

    assert 0 < error["y"] - field["y"] < 150

    here.page.click("button.fix:text('Use 10')")

    assert here.page.input_value("#count") == "10"


def test_cards_stand_side_by_side(visit, klein) -> None:
    """Each with its state and why it is not ready; of one alone nothing is added."""
    here = visit(klein).wait_until_ready()

    assert not here.page.is_visible("#devices")

    pretend(here, klein, devices=3)
    cards = here.page.locator("#devices li")

    assert cards.count() == 3
    assert cards.nth(0).inner_text().splitlines()[:2] == ["1. NVIDIA H100", "Ready"]
    assert "Loading, 40 %" in cards.nth(1).inner_text()
    assert "No room for the model." in cards.nth(2).inner_text()


def test_settings_come_with_the_address(visit, klein) -> None:
    """A copied link fills the form elsewhere, and nothing of it reaches the server."""
    here = visit(klein, permissions=["clipboard-read", "clipboard-write"]).wait_until_ready()
    here.choose(side=80, seed=6, steps=3).make("a lamp & a #1 desk")
    here.page.click("#copy-link")
    here.page.wait_for_selector("#copy-link:text('Copied')")
    link = here.page.evaluate("navigator.clipboard.readText()")
    other = visit(klein)
    other.page.goto(link)
    other.wait_until_ready().wait_until("location.hash === ''")

    assert other.page.input_value("#prompt") == "a lamp & a #1 desk"
    assert other.page.input_value("#seed") == "6"
    assert other.page.input_value("#steps") == "3"
    assert other.page.inner_text("#settings-summary").startswith("80 × 80")
    assert other.page.evaluate("location.hash") == ""


def test_quality_and_guidance_are_asked_for_where_they_mean_something(visit, klein) -> None:
    """Quality for JPEG and WebP; guidance for models that know it."""
    here = visit(klein).wait_until_ready()
    asked = answer_with(here.page, {**DONE, **encoded(checkerboard(64))})

    assert not here.page.is_visible("#quality-field")
    assert not here.page.is_visible("#guidance-field")

    health = json.loads(klein.get("/health")[2])
    health["limits"] |= {"min_guidance": 1.0, "max_guidance": 8.0}
    here.page.route("**/health", lambda route: route.fulfill(json=health))
    here.page.reload()
    here.wait_until_ready()
    here.page.select_option("#format", "jpeg")
    here.choose(quality=80, guidance=3.5).make("a lamp")
    body = asked[-1].post_data_json

    assert (body["output_compression"], body["guidance_scale"]) == (80, 3.5)


def test_shortcuts_are_told_on_a_question_mark(visit, klein) -> None:
    """All of them; in a field it is a question mark."""
    here = visit(klein).wait_until_ready()
    here.page.locator("#prompt").press_sequentially("why?")

    assert here.page.input_value("#prompt") == "why?"

    here.page.evaluate("document.activeElement.blur()")
    here.page.keyboard.press("?")

    assert "Favourite" in here.page.inner_text("#help-dialog")

    here.page.keyboard.press("Escape")
    here.page.keyboard.press("/")

    assert here.page.evaluate("document.activeElement.id") == "prompt"


def test_a_hidden_page_asks_nothing_and_tells_when_it_is_done(visit, klein) -> None:
    """Its polling rests; a notification comes where it is allowed and the queue was long."""
    here = visit(klein, permissions=["notifications"])
    here.page.add_init_script(
        """window.notes = [];
        window.Notification = class extends EventTarget {
            static permission = "granted";
            static async requestPermission() { return "granted"; }
            constructor(title, {body}) { super(); window.notes.push(body); }
        };
        const {now} = performance;
        performance.now = () => now.call(performance) + (window.later ?? 0);"""
    )
    here.page.reload()
    here.wait_until_ready().choose(side=64, count=2)
    here.page.evaluate("document.getElementById('notify').click()")
    here.page.fill("#prompt", "a lamp")
    here.page.click("#make")
    here.page.evaluate(
        """() => {
            window.later = 20000;
            Object.defineProperty(document, "hidden", {get: () => true, configurable: true});
        }"""
    )
    here.wait_until("window.notes.length > 0")

    assert here.page.evaluate("window.notes") == ["2 pictures are done."]

    asked = []
    here.page.on("request", lambda it: asked.append(it))
    here.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    here.page.wait_for_timeout(1500)

    assert asked == []


def pretend(here: Visit, klein: Server, *, devices: int) -> None:
    """Load the page anew from a service with so many cards and an adapter."""
    health = json.loads(klein.get("/health")[2])
    one = {**health["devices"][0], "name": "NVIDIA H100"}
    waits: dict[str, Any] = {"ready": False, "precision": None, "plan": None}
    loading = {**waits, "stage": "loading", "progress": 0.4, "reason": "The model is being loaded."}
    gone = {**waits, "stage": "failed", "left_out": True, "reason": "No room for the model."}
    health["devices"] = [one, {**one, **loading}, {**one, **gone}][:devices]
    here.page.route("**/health", lambda route: route.fulfill(json=health))
    adapters = {"data": [adapter_of("ink", scale=1)]}
    here.page.route("**/v1/loras", lambda route: route.fulfill(json=adapters))
    here.page.reload()
    here.wait_until_ready()
    here.page.wait_for_selector("#adapters")


def test_the_card_is_freed_and_taken_back(visit, scripted) -> None:
    """By one button, which says what it does now; the next picture wakes it too."""
    server = scripted("load=0.3")
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    button = here.page.locator("#rest")
    assert button.inner_text() == "Free the card"
    button.click()
    here.page.wait_for_selector("text=Asleep; the next picture wakes it")
    assert button.inner_text() == "Wake"
    button.click()
    here.wait_until_ready()
    button.click()
    here.page.wait_for_selector("text=Asleep; the next picture wakes it")
    here.choose(prompt="a red circle")
    here.page.click("#make")
    here.page.wait_for_selector("#progress-text:text('Waking the model')")
    here.wait_until_ready()
    assert server.metric("klein_worker_wakes_total", cause="request") == 1


def test_a_service_whose_owner_keeps_the_card_has_no_button(visit, scripted) -> None:
    """It goes once that is known."""
    server = scripted(sleep_api=False)
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    here.expected = [REFUSED]
    here.page.click("#rest")
    here.page.wait_for_selector("#rest", state="hidden")


def test_tokens_are_counted_and_the_cut_is_shown(visit, klein) -> None:
    """While one types; nothing stands there for an empty prompt."""
    here = visit(klein).wait_until_ready()
    here.page.fill("#prompt", "a red circle")
    here.page.wait_for_selector("#tokens:text('of 512 tokens')")
    assert here.page.inner_text("#cut") == ""
    here.page.fill("#prompt", "red " * 700 + "the end")
    here.page.wait_for_selector("#cut:text('Not read from here on: ')")
    here.page.fill("#prompt", "")
    here.page.wait_for_selector("#tokens:empty", state="attached")
