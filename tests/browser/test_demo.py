"""The demo model in the browser."""

from __future__ import annotations

import pytest

from tests.browser.conftest import picture

pytestmark = pytest.mark.system


def test_the_picture_has_the_colour_that_was_asked_for(visit, shapes) -> None:
    """The demo model draws what is typed: red in the middle, blue around it."""
    image = picture(visit(shapes).wait_until_ready().make("a red circle on a blue background"))
    red, green, blue = image.getpixel((image.width // 2, image.height // 2))

    assert red > 2 * max(green, blue), "the middle is not red"

    red, green, blue = image.getpixel((4, 4))

    assert blue > 1.5 * max(red, green), "the corner is not blue"
