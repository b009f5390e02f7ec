"""The page's picker of adapters: what is offered, chosen, sent and remembered."""

from __future__ import annotations

import ast
import json
import re
from email import message_from_bytes
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import (
    adapter_of,
    answer_with,
    checkerboard,
    count_of,
    encoded,
    png,
    tab_to,
)

if TYPE_CHECKING:
    from playwright.sync_api import Request

    from tests.browser.conftest import Visit

pytestmark = pytest.mark.system

DONE = {"type": "image_generation.completed", "seed": 7, "size": "64x64"}
BOTH = [{"name": "ink", "scale": 0.8}, {"name": "outlined", "scale": -0.5}]


def test_nothing_is_shown_where_there_is_no_adapter(visit, klein) -> None:
    """No picker, and no word of adapters in the request."""
    here = visit(klein).offer()

    assert not here.page.is_visible("#adapters")
    assert "loras" not in sent(here)


def test_chosen_adapters_are_sent_with_their_scales(visit, klein) -> None:
    """In the order in which they were chosen; the picture says so beneath it."""
    here = visit(klein).offer({"id": "ink"}, {"id": "other"}, {"id": "outlined"})
    choose(here, ink=0.8, outlined=-0.5)

    assert sent(here)["loras"] == BOTH
    assert here.page.inner_text("#adapters-summary") == "ink 0.8, outlined -0.5"
    assert "ink 0.8, outlined -0.5" in here.page.inner_text("#caption-facts")

    here.upload(checkerboard(64))

    assert sent_form(here) == [
        ("loras[][name]", "ink"),
        ("loras[][scale]", "0.8"),
        ("loras[][name]", "outlined"),
        ("loras[][scale]", "-0.5"),
    ]


def test_four_at_most_are_chosen(visit, klein) -> None:
    """The others cannot be ticked as long as four are, and why is said."""
    here = visit(klein).offer(*({"id": name} for name in "abcde"))
    choose(here, a=1, b=1, c=1, d=1)

    assert here.page.is_disabled("[id='adapter:e']")
    assert "No more than 4" in here.page.inner_text("#adapters-note")

    here.page.click("[id='remove:a']")

    assert here.page.is_enabled("[id='adapter:e']")
    assert here.page.inner_text("#adapters-note") == ""


def test_the_services_own_are_named_only_once_they_are_changed(visit, klein) -> None:
    """They are shown as chosen; untouched they are left to the service, removed none are wanted,
    which a form says with scale 0.
    """
    here = visit(klein).offer({"id": "ink", "scale": 0.83}, {"id": "outlined"})

    assert here.page.inner_text("#adapters-summary") == "ink 0.83"
    assert "loras" not in sent(here, count=2)

    choose(here, outlined=1)

    assert sent(here)["loras"] == [{"name": "ink", "scale": 0.83}, {"name": "outlined", "scale": 1}]

    here.page.click("[id='remove:ink']")
    here.page.click("[id='remove:outlined']")

    assert sent(here)["loras"] == []

    here.upload(checkerboard(64))

    assert sent_form(here) == [("loras[][name]", "ink"), ("loras[][scale]", "0")]


def test_a_picture_brings_its_adapters_back(visit, klein) -> None:
    """With `Same settings`, also those of the service's own that it was made with."""
    here = visit(klein).offer({"id": "ink", "scale": 0.8}, {"id": "outlined"})
    sent(here)
    choose(here, outlined=-0.5)
    sent(here)
    here.page.click("[id='remove:ink']")
    here.page.click("[id='remove:outlined']")
    here.page.click("#restore")

    assert sent(here)["loras"] == BOTH

    here.page.click("#gallery li:last-child button")
    here.page.click("#restore")

    assert sent(here)["loras"] == BOTH[:1]


@pytest.mark.parametrize("is_edit", [False, True])
def test_recipes_name_the_adapters(visit, klein, is_edit) -> None:
    """curl sends what the page sent, and so does Python."""
    here = visit(klein, permissions=["clipboard-read", "clipboard-write"])
    here.offer({"id": "ink"}, {"id": "outlined"})
    choose(here, ink=0.8, outlined=-0.5)
    if is_edit:
        here.upload(checkerboard(64))
    ask(here)
    curl, python = (copied(here, which) for which in ("curl", "python"))
    called = next(
        it
        for it in ast.walk(ast.parse(python))
        if isinstance(it, ast.keyword) and it.arg == "extra_body"
    )

    assert ast.literal_eval(called.value)["loras"] == BOTH
    if is_edit:
        fields = re.findall(r"--form-string '(loras[^=]*)=([^']*)'", curl)
        assert fields == [(f"loras[][{key}]", f"{each[key]}") for each in BOTH for key in each]
    else:
        assert json.loads(re.search(r"-d '(.*)'", curl)[1])["loras"] == BOTH


def test_previews_are_asked_for_when_they_are_seen(visit, scripted) -> None:
    """With the key, and not a hundred at once."""
    key = "a-key-for-the-test"
    server = scripted(api_keys=key)
    server.wait_until_ready()
    here = visit(server)
    here.expected = ["Failed to load resource: the server responded with a status of 401"]
    here.page.fill("#key", key)
    here.page.press("#key", "Enter")
    here.wait_until_ready()
    asked: list[Request] = []
    here.page.on("request", lambda request: asked.append(request))
    here.offer(*hundred(), preview=png(checkerboard(64)))
    here.wait_until("document.querySelector('#adapters-list img')?.naturalWidth === 64")
    previews = [it for it in asked if it.url.endswith("/preview")]

    assert 0 < len(previews) < 20
    assert {it.headers.get("authorization") for it in previews} == {f"Bearer {key}"}

    here.page.locator("#adapters-list li").last.scroll_into_view_if_needed()
    here.page.wait_for_selector("#adapters-list li:last-child img")


def test_a_hundred_adapters_are_found_by_name(visit, klein) -> None:
    """All words count, in any order and case; what is chosen stays in sight; Enter makes
    nothing.
    """
    here = visit(klein).offer(*hundred())
    choose(here, **{"style-003": 1})
    here.page.fill("#adapters-filter", "07 STYLE")
    here.page.press("#adapters-filter", "Enter")
    shown = here.page.locator("#adapters-list label:visible b").all_inner_texts()

    assert shown == ["style-007", *(f"style-07{digit}" for digit in range(10))]
    assert here.page.inner_text("#adapters-note") == "11 of 100 have this in their name."
    assert here.page.is_visible("[id='scale:style-003']")
    assert not here.page.is_visible("#error"), "an empty prompt would be told"

    here.page.press("#adapters-filter", "Escape")

    assert here.page.locator("#adapters-list label:visible").count() == 100


def test_a_few_adapters_need_no_filter(visit, klein) -> None:
    """Eight are seen at a glance."""
    here = visit(klein).offer(*({"id": name} for name in "abcdefgh"))

    assert not here.page.is_visible("#adapters-filter")


def test_what_is_wrong_with_an_adapter_is_said_at_it(visit, klein) -> None:
    """The service's sentence in the picker, the slider marked and focused; gone when mended."""
    here = visit(klein).offer({"id": "ink"}, {"id": "outlined"})
    here.expected = ["Failed to load resource: the server responded with a status of 400"]
    choose(here, ink=0.8, outlined=-0.5)
    here.page.evaluate("document.getElementById('adapters').open = false")
    message = "There is no adapter named outlined; names like it: outline."
    error = {"message": message, "code": "model_not_found", "param": "loras[1].name"}
    here.page.route("**/generations", lambda it: it.fulfill(status=400, json={"error": error}))
    here.page.fill("#prompt", "a cat")
    here.page.click("#make")
    here.page.wait_for_selector(f"#adapters-error:text('{message}')")
    wrong = here.page.locator("#chosen [aria-invalid]")

    assert not here.page.is_visible("#error")
    assert wrong.get_attribute("id") == "scale:outlined"
    assert wrong.get_attribute("aria-describedby") == "adapters-error"
    assert here.page.evaluate("document.activeElement.id") == "scale:outlined"

    sent(here)

    assert not here.page.is_visible("#adapters-error")
    assert wrong.count() == 0


@pytest.mark.parametrize("place", ["scale:outlined", "adapter:outlined"])
def test_the_list_is_asked_for_again_when_the_page_is_come_back_to(visit, klein, place) -> None:
    """A new adapter is there, one that is gone is said to be, the choice and the focus stay."""
    here = visit(klein).offer({"id": "ink"}, {"id": "outlined"})
    choose(here, ink=0.8, outlined=-0.5)
    here.page.focus(f"[id='{place}']")
    body = {"data": [adapter_of("new"), adapter_of("outlined")]}
    here.page.route("**/v1/loras", lambda route: route.fulfill(json=body))
    here.page.evaluate("window.dispatchEvent(new Event('focus'))")
    here.page.wait_for_selector("[id='adapter:new']")

    assert "no longer there" in here.page.inner_text("#chosen li:first-child")
    assert "no longer there" not in here.page.inner_text("#chosen li:last-child")
    assert here.page.evaluate("document.activeElement.id") == place
    assert sent(here)["loras"] == BOTH


def test_adapters_are_chosen_with_the_keyboard(visit, klein) -> None:
    """Ticked, scaled and removed; the focus is always seen and never lost."""
    here = visit(klein).offer({"id": "ink"}, {"id": "outlined"})
    keys = here.page.keyboard
    here.page.focus("#prompt")
    tab_to(here.page, "adapter:outlined")
    keys.press("Space")

    assert here.page.evaluate("document.activeElement.id") == "adapter:outlined"

    here.page.focus("#make")
    tab_to(here.page, "scale:outlined")
    keys.press("ArrowLeft")
    slider = here.page.get_by_role("slider", name="Scale of outlined")

    assert slider.get_attribute("aria-valuetext") == "0.95"
    assert sent(here)["loras"] == [{"name": "outlined", "scale": 0.95}]

    here.page.get_by_role("button", name="Remove outlined").press("Enter")

    assert here.page.evaluate("document.activeElement.id") == "adapter:outlined"
    assert here.page.locator("#chosen li").count() == 0


def test_a_name_full_of_markup_stays_text(visit, klein) -> None:
    """File names are somebody else's."""
    evil = '<img src=x onerror="window.broken=1">'
    here = visit(klein).offer({"id": evil, "scale": 1})

    assert here.page.inner_text("#chosen b") == evil
    assert here.page.inner_text("#adapters-list b") == evil
    assert here.page.locator("img[src='x']").count() == 0


def hundred() -> list[dict[str, object]]:
    """So many adapters, all with previews."""
    names = [f"style-{number:03}" for number in range(100)]
    return [{"id": name, "preview": f"/v1/loras/{name}/preview"} for name in names]


def choose(here: Visit, **scales: float) -> None:
    """Tick adapters and set their scales."""
    for name, scale in scales.items():
        here.page.check(f"[id='adapter:{name}']")
        here.page.fill(f"[id='scale:{name}']", str(scale))


def ask(here: Visit, count: int = 1) -> Request:
    """Ask for pictures; return the last request."""
    requests = answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    here.page.fill("#count", str(count))
    here.make("a cat")

    assert [count_of(each) for each in requests] == [count]

    return requests[-1]


def sent(here: Visit, count: int = 1) -> dict[str, object]:
    """What the page asks for a picture with."""
    return ask(here, count).post_data_json


def sent_form(here: Visit) -> list[tuple[str, str]]:
    """What the page asks for an edit with, as far as it is of adapters."""
    request = ask(here)
    head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + request.post_data_buffer).get_payload()
    pairs = [
        (part.get_param("name", header="content-disposition"), part.get_payload()) for part in parts
    ]
    return [(name, text) for name, text in pairs if name.startswith("loras")]


def copied(here: Visit, which: str) -> str:
    """The recipe that a click copies."""
    here.page.click(f"#copy-{which}")
    here.page.wait_for_selector(f"#copy-{which}:text('Copied')")
    return here.page.evaluate("navigator.clipboard.readText()")
