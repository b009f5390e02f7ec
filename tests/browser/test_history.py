"""What the page keeps: pictures, the form, and a job in the middle of which it is loaded anew."""

from __future__ import annotations

import io
import re
import zipfile

import pytest

from tests.browser.conftest import answer_with, checkerboard, encoded, picture

pytestmark = pytest.mark.system

DONE = {"type": "image_generation.completed", "seed": 7, "size": "64x64"}


def test_pictures_and_form_are_there_after_a_reload(visit, klein) -> None:
    """With all that they were made with: prompt, seed, reference and mask; nothing is lost."""
    here = visit(klein).wait_until_ready().choose(seed=9).upload(checkerboard(64))
    here.page.click("text=Paint a mask")
    here.page.click("#mask-canvas", position={"x": 10, "y": 10})
    here.page.click("#mask-done")
    data = here.make("a stone in the rain")
    here.page.fill("#prompt", "half a thought")
    here.page.reload()
    here.wait_until_ready()
    here.page.wait_for_selector("#caption-prompt:text('a stone in the rain')")
    here.page.wait_for_selector("#references li")
    here.page.wait_for_selector("#room:text('uses ')")

    assert here.download() == data
    assert here.page.input_value("#prompt") == "half a thought"
    assert here.page.input_value("#seed") == "9"
    assert here.page.locator("#references li").count() == 1
    assert "1 picture" in here.page.inner_text("#room")
    assert re.search(r"uses .* of .*B", here.page.inner_text("#room"))

    here.page.click("#references button.remove")
    here.page.click("#restore")
    here.page.wait_for_selector("#references button.unmask")

    assert here.page.input_value("#prompt") == "a stone in the rain"
    assert here.make("a stone in the rain") == data


@pytest.mark.parametrize("is_edit", [False, True])
def test_a_job_is_found_again_after_a_reload(visit, scripted, is_edit) -> None:
    """The same is sent again under the same name, and the picture comes, once."""
    server = scripted("slow=3")
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    if is_edit:
        here.upload(checkerboard(64))
    sent = []
    here.page.on("request", lambda it: sent.append(it) if "/v1/images/" in it.url else None)
    here.page.fill("#prompt", "the one that lasts")
    here.page.click("#make")
    here.page.wait_for_selector("#progress-text:text-matches('^Step [1-9]')")
    here.page.reload()
    here.page.wait_for_selector("#progress-text:text-matches('^Step [1-9]')")
    here.page.wait_for_selector("#gallery li")
    here.wait_for_picture()
    first, second = (it.headers["idempotency-key"] for it in sent)

    assert first == second
    assert re.fullmatch("[A-Za-z0-9_.-]{1,128}", first)
    assert is_edit or sent[0].post_data == sent[1].post_data is not None
    assert here.page.locator("#gallery li").count() == 1
    assert here.page.inner_text("#caption-prompt") == "the one that lasts"
    assert server.metric("klein_images_total", mode="edit" if is_edit else "generate") == 1


def test_the_job_of_a_closed_tab_waits_to_be_asked_for(visit, scripted) -> None:
    """It is neither lost nor made unasked."""
    server = scripted("slow=3")
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    here.page.fill("#prompt", "left behind")
    here.page.click("#make")
    here.page.wait_for_selector("#progress-text:text-matches('^Step [1-9]')")
    other = here.page.context.new_page()
    here.page.close()
    here.page = other
    other.goto(server.url)
    here.wait_until_ready()
    other.wait_for_selector("#waiting-list :text('a tab that was closed')")
    other.click("#waiting-list button.release")
    other.wait_for_selector("#gallery li")


def test_favourites_deleting_and_arrows(visit, klein) -> None:
    """A star that stays, a picture that can be had back, and arrows that go through them."""
    here = visit(klein).wait_until_ready().choose(side=64)
    for seed in (1, 2):
        here.choose(seed=seed).make("a lamp")
    here.page.click("#favourite")
    here.page.evaluate("document.activeElement.blur()")
    here.page.keyboard.press("ArrowRight")
    here.page.wait_for_selector("#caption-facts:text('seed 1')")
    here.page.check("#favourites-only")

    assert here.page.locator("#gallery li").count() == 1

    here.page.uncheck("#favourites-only")
    here.page.click("#delete")
    here.page.wait_for_selector("#caption-facts:text('seed 2')")

    assert here.page.locator("#gallery li").count() == 1

    here.page.click("#undelete")
    here.page.wait_for_selector("#caption-facts:text('seed 1')")
    here.page.click("#delete")
    here.page.wait_for_selector("#deleted")
    here.page.reload()
    here.wait_until_ready()
    here.page.wait_for_selector("#gallery li[data-favourite='true']")

    assert here.page.locator("#gallery li").count() == 1


def test_a_full_browser_offers_the_oldest_and_deletes_nothing(visit, klein) -> None:
    """How much it would free is said; favourites are not among them."""
    here = visit(klein)
    here.page.add_init_script(
        "navigator.storage.estimate = async () => ({usage: 900e6, quota: 1000e6})"
    )
    here.page.reload()
    here.wait_until_ready()
    answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    for _ in range(3):
        here.make("a lamp")
    here.page.click("#favourite")
    here.page.wait_for_selector("#full")

    assert here.page.locator("#gallery li").count() == 3

    here.page.click("#delete-oldest:has-text('the oldest 2 pictures')")
    here.page.wait_for_selector("#gallery:not(:has(li:nth-child(2)))")

    assert here.page.get_attribute("#favourite", "aria-pressed") == "true"


def test_a_browser_without_storage_says_so(visit, klein) -> None:
    """Private windows of some browsers have no IndexedDB; pictures are made all the same."""
    here = visit(klein)
    here.page.add_init_script(
        "indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); }"
    )
    here.page.reload()
    here.wait_until_ready().choose(side=64).make("a lamp")

    here.page.wait_for_selector("#room:text('keeps nothing')")

    assert here.page.locator("#gallery li").count() == 1


def test_all_pictures_come_as_one_zip(visit, klein) -> None:
    """Named by prompt and seed, every one whole."""
    here = visit(klein).wait_until_ready().choose(side=64)
    made = [here.choose(seed=seed).make('Größe: a/b "c"') for seed in (3, 4, 4)]
    with here.page.expect_download() as saving:
        here.page.click("#zip")
    with zipfile.ZipFile(io.BytesIO(saving.value.path().read_bytes())) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        found = [archive.read(name) for name in names]

    assert names == ["Größe-a-b-c-4.png", "Größe-a-b-c-4-2.png", "Größe-a-b-c-3.png"]
    assert sorted(found) == sorted(made)
    assert picture(found[0]).size == (64, 64)
