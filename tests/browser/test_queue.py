"""Asking for more while a picture is on its way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import answer_with, checkerboard, encoded

pytestmark = pytest.mark.system

if TYPE_CHECKING:
    from playwright.sync_api import Request

    from tests.browser.conftest import Visit
    from tests.support.server import Server

DONE = {"type": "image_generation.completed", "seed": 7, "size": "64x64"}


def test_more_can_be_asked_for_while_one_runs(visit, scripted, tmp_path: Path) -> None:
    """A list with places and a cancel each; the last picture stays until the next one's first
    preview.
    """
    gate = tmp_path / "gate"
    gate.touch()
    server = scripted(f"gate={gate}")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(seed=1)
    here.make("the first")
    gate.unlink()
    for prompt in ("the second", "the third", "the fourth"):
        here.page.fill("#prompt", prompt)
        here.page.click("#make")
        if prompt == "the second":
            assert here.page.get_attribute("#picture", "alt") == "the first"
            assert here.page.is_visible("#picture")

    rows = here.page.locator("#waiting-list li")
    here.page.wait_for_selector("#waiting-list li:nth-child(3) .note:text('Number 3, done in')")

    assert rows.locator(".words").all_inner_texts() == ["the second", "the third", "the fourth"]

    rows.nth(1).get_by_role("button", name="Cancel: the third").click()
    here.page.wait_for_selector("#waiting-list li:nth-child(3)", state="detached")
    gate.touch()
    here.page.wait_for_selector("#gallery li:nth-child(2)")
    here.wait_for_picture()

    prompts = here.page.locator("#gallery button").evaluate_all(
        "all => all.map(it => it.ariaLabel.split(': ')[1])"
    )

    assert prompts == ["the fourth", "the second", "the first"]


def test_n_pictures_appear_in_a_grid_as_they_come(visit, scripted) -> None:
    """One request, with a place for each, and one entry where more is asked for; a click shows one
    of them.
    """
    server = scripted("slow=2")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(seed=40, count=3)
    sent = pictures_asked_for(here)
    here.page.fill("#prompt", "a stone")
    here.page.click("#make")

    assert here.page.locator("#batch li").count() == 3

    here.page.wait_for_selector("#batch li:nth-child(1) button:enabled")
    here.page.wait_for_selector("#progress-text:text('Picture 2 of 3')")

    assert here.page.locator("#batch li:nth-child(3) button").is_disabled()

    here.choose(seed=50, count=1)
    here.page.click("#make")
    here.page.wait_for_selector("#waiting-list li:nth-child(1) .note:text('1 of 3 done')")
    here.page.press("#waiting-list li:nth-child(2) button.stop", "Enter")
    here.wait_for_picture()
    here.page.click("#batch li:nth-child(2) button")
    here.page.wait_for_selector("#caption-facts:text('seed 41')")

    assert [(it.post_data_json["n"], it.post_data_json["seed"]) for it in sent] == [(3, 40)]


def test_one_cancel_takes_back_all_pictures_of_a_job(visit, scripted) -> None:
    """Those that wait too; what was made before stays."""
    server = scripted("slow=2")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(count=3)
    here.page.fill("#prompt", "a stone")
    here.page.click("#make")
    here.page.wait_for_selector("#batch li:nth-child(1) button:enabled")
    here.page.press("#cancel", "Enter")
    here.page.wait_for_selector('#stage[aria-busy="false"]', state="attached")
    deadline = time.monotonic() + 10
    while any(queue_of(server)):
        assert time.monotonic() < deadline

        here.page.wait_for_timeout(100)

    assert here.page.locator("#gallery li").count() == 1
    assert server.metric("klein_images_total", mode="generate") == 1


def test_a_reload_in_the_middle_finds_all_pictures_again(visit, scripted) -> None:
    """Under the same name; the grid has those that were there, and none is made twice."""
    server = scripted("slow=1")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(seed=40, count=3)
    sent = pictures_asked_for(here)
    here.page.fill("#prompt", "a stone")
    here.page.click("#make")
    here.page.wait_for_selector("#batch li:nth-child(1) button:enabled")
    here.page.wait_for_selector("#progress-text:text('Picture 2 of 3')")
    here.page.reload()
    here.page.wait_for_selector("#batch li:nth-child(1) button:enabled")
    here.page.wait_for_selector("#batch li:nth-child(3) button:enabled")
    here.wait_for_picture()
    labels = here.page.locator("#gallery button").evaluate_all("all => all.map(it => it.ariaLabel)")

    assert [label.split(":")[0] for label in labels] == ["Seed 42", "Seed 41", "Seed 40"]
    assert len({it.headers["idempotency-key"] for it in sent}) == 1
    assert len({it.post_data for it in sent}) == 1
    assert server.metric("klein_images_total", mode="generate") == 3


def test_more_pictures_than_the_service_takes_are_asked_for_in_halves(visit, klein) -> None:
    """Where it says that the number is what it refuses."""
    here = visit(klein).wait_until_ready().choose(seed=40, side=64, count=5)
    here.expected = ["Failed to load resource: the server responded with a status of 400"]
    sent = pictures_asked_for(here)
    error = {"message": "Too many.", "code": "invalid_value", "param": "n"}
    here.page.route(
        "**/generations", lambda it: it.fulfill(status=400, json={"error": error}), times=1
    )
    here.make("a stone")
    asked = [(it.post_data_json["n"], it.post_data_json["seed"]) for it in sent]

    assert asked == [(5, 40), (3, 40), (2, 43)]
    assert here.page.locator("#gallery li").count() == 5


def test_a_full_service_is_asked_again_after_a_countdown(visit, klein) -> None:
    """Its own seconds are counted down where the job waits, and then it is sent once more."""
    here = visit(klein).wait_until_ready()
    here.expected = ["Failed to load resource: the server responded with a status of 503"]
    answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    error = {"message": "The queue is full.", "code": "queue_full"}
    here.page.route(
        "**/generations",
        lambda it: it.fulfill(status=503, headers={"retry-after": "2"}, json={"error": error}),
        times=1,
    )
    here.page.fill("#prompt", "a cat")
    here.page.click("#make")
    note = "#waiting-list .note"
    here.page.wait_for_selector(f"{note}:text('The queue is full. Trying again in 2 s')")
    started = time.monotonic()
    here.page.wait_for_selector(f"{note}:text('Trying again in 1 s')", timeout=5_000)
    left_ms = 5_000 - 1_000 * (time.monotonic() - started)
    here.page.wait_for_selector('#stage[aria-busy="false"]', state="attached", timeout=left_ms)
    here.wait_for_picture()

    assert here.page.locator("#gallery li").count() == 1


def test_a_cut_connection_goes_on_under_the_same_name(visit, klein) -> None:
    """As after a change of the network."""
    here = visit(klein).wait_until_ready()
    asked = answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    cut = []

    def answer(route) -> None:
        cut.append(route.request)
        route.fulfill(body=": queued 0\n\n", content_type="text/event-stream")

    here.page.route("**/generations", answer, times=1)
    here.make("a cat")

    assert [it.headers["idempotency-key"] for it in cut] == [
        it.headers["idempotency-key"] for it in asked
    ]


def test_a_key_that_was_used_for_another_body_is_replaced(visit, klein) -> None:
    """A page of a new version may write the same wish in another way."""
    here = visit(klein).wait_until_ready()
    here.expected = ["Failed to load resource: the server responded with a status of 400"]
    asked = answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    error = {"message": "Another body.", "code": "idempotency_key_reused"}
    refused = []

    def refuse(route) -> None:
        refused.append(route.request)
        route.fulfill(status=400, json={"error": error})

    here.page.route("**/generations", refuse, times=1)
    here.make("a cat")

    assert refused[0].headers["idempotency-key"] != asked[0].headers["idempotency-key"]


def test_many_pictures_in_a_row_are_not_refused(visit, klein) -> None:
    """A stream that was read to its end makes way for the next, within the same minute."""
    here = visit(klein).wait_until_ready().choose(side=64, count=9)
    here.make("a lamp")

    assert here.page.locator("#gallery li").count() == 9


def queue_of(server: Server) -> tuple[int, int]:
    """How many pictures wait and run."""
    queue = json.loads(server.get("/health")[2])["queue"]
    return queue["size"], queue["running"]


def pictures_asked_for(here: Visit) -> list[Request]:
    """The requests for pictures that the page sends from now on."""
    sent: list[Request] = []
    here.page.on("request", lambda it: sent.append(it) if "/v1/images/" in it.url else None)
    return sent
