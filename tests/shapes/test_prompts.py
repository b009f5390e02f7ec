"""People say one thing in many ways, and every way has one meaning."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest

from tests.support.long_form import one_of
from tools.shapes.prompts import describe, instruct
from tools.shapes.scenes import Edit, Scene, Thing, sample_edit, sample_scene

RED_CIRCLE = Scene((Thing("circle", "red"),))
BLUE_SQUARE_RIGHT = Scene(
    (Thing("circle", "red", place="left"), Thing("square", "blue", place="right"))
)


@cache
def phrasings(scene):
    """What four thousand people would say of it."""
    rng = random.Random(5)
    return frozenset(describe(scene, rng) for _ in range(4000))


@pytest.mark.parametrize(
    ("scene", "prompt"),
    [
        (RED_CIRCLE, "a red circle"),
        (RED_CIRCLE, "red circle"),
        (RED_CIRCLE, "A red circle."),
        (RED_CIRCLE, "draw a red circle"),
        (RED_CIRCLE, "a red circle on a white background"),
        (Scene((Thing("circle", "red"),), "blue"), "a red circle on a blue background"),
        (
            Scene((Thing("star", "green", "small", "top left"),)),
            "a small green star in the top left",
        ),
        (Scene((Thing("heart", "blue", "large"),)), "a photo of a large blue heart"),
        (Scene((Thing("cross", "gray"),)), "a grey cross"),
        (Scene((Thing("cross", "gray"),)), "a gray cross"),
        (Scene((Thing("ring", "orange"),)), "an orange ring"),
        (BLUE_SQUARE_RIGHT, "a red circle left of a blue square"),
        (BLUE_SQUARE_RIGHT, "a blue square right of a red circle"),
        (BLUE_SQUARE_RIGHT, "a red circle and a blue square"),
    ],
)
def test_obvious_phrasing(scene, prompt):
    """What a newcomer types is among the phrasings."""
    assert prompt in phrasings(scene)


@pytest.mark.parametrize("count", one_of(3000, 30_000))
def test_one_meaning(count):
    """No prompt is said of two different scenes."""
    rng = random.Random(6)
    meanings: dict[str, str] = {}
    for _ in range(count):
        scene = sample_scene(rng)
        prompt = describe(scene, rng).lower()
        assert meanings.setdefault(prompt, scene.canonical()) == scene.canonical(), prompt


def test_articles():
    """Words that begin with a vowel take "an", and no word is doubled or empty."""
    rng = random.Random(7)
    for _ in range(3000):
        words = describe(sample_scene(rng), rng).lower().split()
        pairs = list(itertools.pairwise(words))
        assert not any(first == "a" and second[0] in "aeiou" for first, second in pairs)
        assert not any(first == second for first, second in pairs)


def edits():
    """The three kinds of edit on one red circle, with an instruction anybody would give."""
    green = Scene((Thing("circle", "green"),))
    star = Scene((Thing("star", "red"),))
    on_yellow = Scene((Thing("circle", "red"),), "yellow")
    return [
        (Edit(RED_CIRCLE, green, 0), "make the circle green"),
        (Edit(RED_CIRCLE, green, 0), "make it green"),
        (Edit(RED_CIRCLE, green, 0), "change the colour to green"),
        (Edit(RED_CIRCLE, star, 0), "replace the circle with a star"),
        (Edit(RED_CIRCLE, star, 0), "turn it into a star"),
        (Edit(RED_CIRCLE, on_yellow, None), "make the background yellow"),
    ]


@pytest.mark.parametrize(("edit", "instruction"), edits())
def test_obvious_instruction(edit, instruction):
    """What a newcomer asks of a picture is among the instructions."""
    rng = random.Random(8)
    assert instruction in {instruct(edit, rng).text for _ in range(2000)}


def test_clear_instructions():
    """Of two things, the one that is meant is always named."""
    rng = random.Random(9)
    for _ in range(2000):
        edit = sample_edit(rng)
        said = instruct(edit, rng)
        if edit.target is not None and len(edit.before.things) == 2:
            assert said.names_shape
            shapes = {thing.shape for thing in edit.before.things}
            assert said.names_colour or len(shapes) == 2
