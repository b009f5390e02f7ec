"""Work on a picture: edits of it, masks, more of it at its sides, and looking at it closely."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageChops

from tests.browser.conftest import answer_with, checkerboard, encoded, picture, png

if TYPE_CHECKING:
    from tests.browser.conftest import Visit

pytestmark = pytest.mark.system

DONE = {"type": "image_generation.completed", "seed": 7, "size": "64x64"}


def test_edit_this_replaces_and_add_appends(visit, klein) -> None:
    """The first is one click from a picture to its edit; the other collects."""
    here = visit(klein).wait_until_ready().choose(side=64, seed=1)
    here.upload(checkerboard(64), checkerboard(96))
    answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    here.make("a lamp")
    here.page.click("#reuse")
    here.page.wait_for_selector("#references li:nth-child(3)")
    here.page.click("#edit")
    here.page.wait_for_selector("#references:not(:has(li:nth-child(2)))")

    assert "klein-7" in here.page.inner_text("#references li")
    assert here.page.evaluate("document.activeElement.id") == "prompt"


def test_before_and_after_have_a_line_between_them(visit, klein) -> None:
    """On its left is what was worked from, on its right what was made; the keyboard moves it."""
    here = visit(klein).wait_until_ready().upload(Image.new("RGB", (64, 64), "red"))
    made = Image.new("RGB", (64, 64), "blue")
    answer_with(here.page, {**DONE, **encoded(made)})
    here.make("blue")
    here.page.click("#before")
    here.page.wait_for_selector("#split")
    left, right = halves(here)

    assert left == (255, 0, 0)
    assert right == (0, 0, 255)

    here.page.focus("#divide")
    here.page.keyboard.press("Home")

    assert halves(here) == [(0, 0, 255), (0, 0, 255)]

    here.page.keyboard.press("Escape")

    assert not here.page.is_visible("#split")


def test_two_pictures_are_compared(visit, klein) -> None:
    """The one on show and another of the history."""
    here = visit(klein).wait_until_ready()
    for colour in ("red", "blue"):
        here.page.unroute_all()
        answer_with(here.page, {**DONE, **encoded(Image.new("RGB", (64, 64), colour))})
        here.make(colour)
    here.page.click("#compare")
    here.page.click("#gallery li:nth-child(2) button")
    here.page.wait_for_selector("#split")

    assert halves(here) == [(255, 0, 0), (0, 0, 255)]


def test_one_pixel_for_one_pixel(visit, klein) -> None:
    """A picture larger than its frame is moved with the mouse and with the arrows."""
    here = visit(klein, width=360).wait_until_ready()
    large = {**DONE, "size": "1024x1024", **encoded(Image.new("RGB", (1024, 1024), "red"))}
    answer_with(here.page, large)
    here.make("red")
    here.page.click("#zoom")
    width = here.page.evaluate("document.getElementById('picture').getBoundingClientRect().width")
    before = here.page.evaluate("document.getElementById('frame').scrollLeft")
    box = here.box("#frame")
    x, y = box["x"] + 100, box["y"] + 100
    here.page.mouse.move(x, y)
    here.page.mouse.down()
    here.page.mouse.move(x - 50, y)
    here.page.mouse.up()

    assert width == 1024
    here.wait_until(f"document.getElementById('frame').scrollLeft === {before + 50}")

    here.page.focus("#frame")
    here.page.keyboard.press("z")

    assert here.page.get_attribute("#frame", "data-zoom") == "false"


def test_variations_take_the_seeds_that_follow(visit, klein) -> None:
    """Four, as one job."""
    here = visit(klein).wait_until_ready().choose(side=64, seed=5)
    here.make("a lamp")
    here.page.click("#variations")
    here.page.wait_for_selector("#batch li:nth-child(4)")
    here.wait_for_picture()
    seeds = here.page.locator("#gallery button").evaluate_all(
        "all => all.map(it => it.ariaLabel.split(':')[0])"
    )

    assert seeds == ["Seed 9", "Seed 8", "Seed 7", "Seed 6", "Seed 5"]


def test_styles_follow_the_prompt_and_are_kept(visit, klein) -> None:
    """Their words are sent; which are chosen is known after a reload."""
    here = visit(klein).wait_until_ready()
    asked = answer_with(here.page, {**DONE, **encoded(checkerboard(64))})
    here.page.click("#styles summary")
    here.page.fill("#style-name", "Ink")
    here.page.fill("#style-words", "ink on paper")
    here.page.press("#style-words", "Enter")
    here.page.reload()
    here.wait_until_ready().make("a lamp")

    assert here.page.inner_text("#styles-summary") == "Ink"
    assert asked[-1].post_data_json["prompt"] == "a lamp, ink on paper"

    here.page.click("#restore")

    assert here.page.input_value("#prompt") == "a lamp, ink on paper"
    assert here.page.inner_text("#styles-summary") == "none"


def test_a_mask_is_inverted_feathered_and_loaded(visit, klein) -> None:
    """Every tool in the mask that is sent: black and white, or transparent, in; soft edges out."""
    here = visit(klein).wait_until_ready().upload(checkerboard(128))
    here.page.click("text=Paint a mask")
    black = Image.new("L", (128, 128), 0)
    black.paste(255, (0, 0, 64, 128))
    here.page.set_input_files(
        "#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": png(black)}
    )
    here.page.wait_for_selector("#coverage:text('50 % may change')")
    loaded = saved_mask(here)

    assert loaded.getpixel((10, 64)) == 0
    assert loaded.getpixel((100, 64)) == 255

    here.page.click("#mask-invert")
    inverted = saved_mask(here)

    assert inverted.getpixel((10, 64)) == 255
    assert inverted.getpixel((100, 64)) == 0

    here.page.click("#mask-feather")
    soft = saved_mask(here)

    assert soft.getpixel((64, 64)) not in {0, 255}
    assert soft.getpixel((2, 64)) == 255

    here.page.click("#mask-undo")

    assert ImageChops.difference(saved_mask(here), inverted).getbbox() is None


def test_the_brush_follows_the_wheel_and_the_brackets(visit, klein) -> None:
    """`[` is smaller and `]` larger; the wheel does the same."""
    here = visit(klein).wait_until_ready().upload(checkerboard(64))
    here.page.click("text=Paint a mask")
    here.page.fill("#brush", "10")
    here.page.focus("#mask-canvas")
    here.page.keyboard.press("]")

    assert here.page.input_value("#brush") == "11"

    here.page.keyboard.press("[")
    here.page.hover("#mask-canvas")
    here.page.mouse.wheel(0, 100)
    here.wait_until("document.getElementById('brush').value === '9'")


def test_escape_asks_before_it_discards(visit, klein) -> None:
    """Whatever was painted; with nothing painted it leaves."""
    here = visit(klein).wait_until_ready().upload(checkerboard(64))
    here.page.click("text=Paint a mask")
    here.page.wait_for_selector("#mask-dialog[open]")
    here.page.keyboard.press("Escape")

    assert not here.page.is_visible("#mask-dialog")

    here.page.click("text=Paint a mask")
    here.page.wait_for_selector("#mask-dialog[open]")
    here.page.click("#mask-canvas")
    here.page.keyboard.press("Escape")

    assert here.page.is_visible("#mask-ask")

    here.page.keyboard.press("Escape")

    assert here.page.is_visible("#mask-dialog")
    assert not here.page.is_visible("#mask-ask")

    here.page.keyboard.press("Escape")
    here.page.click("#mask-discard")

    assert not here.page.is_visible("#mask-dialog")
    assert here.page.locator("#references button.unmask").count() == 0


def test_a_picture_is_extended_on_the_demo(visit, shapes) -> None:
    """What was there stays to the pixel, but for the seam; what is new is painted."""
    source = checkerboard(128)
    here = visit(shapes).wait_until_ready().choose(seed=3).upload(source)
    here.page.click("#references button.extend")
    here.page.fill("#extend-left", "0")
    here.page.fill("#extend-right", "60")

    assert here.page.inner_text("#extend-size") == "192 × 128"

    here.page.click("#extend-done")
    here.page.wait_for_selector("#references button.unmask")
    padded = saved_reference(here)
    made = picture(here.make("a red circle on a blue background"))
    kept, new = (0, 0, 112, 128), (136, 0, 192, 128)

    assert made.size == padded.size == (192, 128)
    assert made.crop(kept).tobytes() == source.crop(kept).tobytes()
    assert made.crop(new).tobytes() != padded.crop(new).tobytes()
    assert padded.crop((0, 0, 128, 128)).tobytes() == source.tobytes()


def halves(here: Visit) -> list[tuple[int, ...]]:
    """The colours a quarter from the left and from the right of the picture, as they are seen."""
    here.wait_until(
        """Promise.all(["picture", "other"].map((id) => document.getElementById(id))
            .filter((it) => it.src).map((it) => it.decode().then(() => it.getAnimations())))
            .then((all) => all.flat().length === 0)"""
    )
    data = here.page.locator("#picture").screenshot()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [image.getpixel((image.width * part // 8, image.height // 2)) for part in (1, 7)]


def saved_mask(here: Visit) -> Image.Image:
    """The mask's alpha, as it is saved."""
    with here.page.expect_download() as saving:
        here.page.click("#mask-save")
    return Image.open(saving.value.path()).getchannel("A")


def saved_reference(here: Visit) -> Image.Image:
    """The first picture to work from."""
    size, pixels = here.page.evaluate(
        """() => {
            const image = document.querySelector("#references img");
            const {naturalWidth: width, naturalHeight: height} = image;
            const canvas = Object.assign(document.createElement("canvas"), {width, height});
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [[width, height], [...context.getImageData(0, 0, width, height).data]];
        }"""
    )
    return Image.frombytes("RGBA", size, bytes(pixels)).convert("RGB")
