"""The judge passes what was asked for and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.support.long_form import one_of
from tools.shapes.draw import draw
from tools.shapes.exam import EDIT, ONE, TWO, edit_questions, examine, scene_questions
from tools.shapes.judge import judge
from tools.shapes.scenes import COLOUR_NAMES, COLOURS, SHAPES, Scene, Thing, lay_out, sample_scene

pytestmark = pytest.mark.torch

ASKED = lay_out(Scene((Thing("circle", "red"),), "blue"), 128, 128)
PAIR = lay_out(
    Scene((Thing("star", "green", place="left"), Thing("ring", "green", place="right"))), 192, 128
)


def with_mark(picture, index, **change):
    marks = list(picture.marks)
    marks[index] = replace(marks[index], **change)
    return replace(picture, marks=tuple(marks))


def faults(asked, drawn):
    return " ".join(judge(asked, draw(drawn)).faults)


@pytest.mark.full
@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 128), (192, 320)])
def test_truth_passes(size):
    """Every scene, drawn as it should be, passes at any size."""
    rng = random.Random(size[0])
    for _ in range(25):
        asked = lay_out(sample_scene(rng), *size)
        assert judge(asked, draw(asked)).faults == ()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "circle"])
def test_wrong_shape(shape):
    """Another shape in the right place and colour does not pass."""
    assert f"looks like a {shape}" in faults(ASKED, with_mark(ASKED, 0, shape=shape))


@pytest.mark.parametrize("colour", [c for c in COLOUR_NAMES if c not in ("red", "blue")])
def test_wrong_colour(colour):
    """Another colour of the right shape does not pass, nor as the background's."""
    assert f"circle is {colour}" in faults(ASKED, with_mark(ASKED, 0, colour=colour))
    assert f"background is {colour}" in faults(ASKED, replace(ASKED, background=colour))


@pytest.mark.parametrize("change", [{"x": 40.0}, {"y": 90.0}, {"x": 72.0}])
def test_wrong_place(change):
    """The right object a little or far from its place does not pass."""
    assert "from its place" in faults(ASKED, with_mark(ASKED, 0, **change))


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_wrong_size(scale):
    """The right object too small or too large does not pass."""
    changed = with_mark(ASKED, 0, radius=ASKED.marks[0].radius * scale)
    assert "overlaps the truth" in faults(ASKED, changed)


def test_missing_and_stray():
    """A picture without its object does not pass, nor one with an object too many."""
    nothing = replace(ASKED, marks=())
    stray = replace(
        ASKED, marks=(*ASKED.marks, replace(ASKED.marks[0], x=20.0, y=20.0, radius=16.0))
    )

    assert "there is no circle" in faults(ASKED, nothing)
    assert "of the background" in faults(ASKED, stray)


def test_swapped_pair():
    """Two objects of one colour that changed places do not pass."""
    swapped = with_mark(with_mark(PAIR, 0, shape="ring"), 1, shape="star")

    assert judge(PAIR, draw(PAIR)).passed
    assert "looks like a ring" in faults(PAIR, swapped)


def test_noise_and_size():
    """Slightly noisy pictures pass; pictures of another size never do."""
    noise = np.random.default_rng(0).normal(0, 8, (128, 128, 3))
    noisy = (draw(ASKED) + noise).clip(0, 255).astype(np.uint8)

    assert judge(ASKED, noisy).passed
    assert not judge(ASKED, noisy[:, :64]).passed


def test_plain_canvas():
    """A canvas of nothing but the background's colour is not a picture of anything."""
    plain = np.full((128, 128, 3), COLOURS["blue"], np.uint8)

    assert not judge(ASKED, plain).passed


@pytest.mark.parametrize("count", one_of(4, 12))
def test_examination(count):
    """Perfect answers get full marks in every kind, and blank ones none."""
    questions = scene_questions(count) + edit_questions(4)
    perfect = examine(questions, [draw(question.asked) for question in questions])
    blank = examine(questions, [np.zeros_like(draw(q.asked)) for q in questions])

    assert perfect.figures() == {TWO: 1.0, ONE: 1.0, EDIT: 1.0}
    assert set(blank.figures().values()) == {0.0}
    assert len(blank.failures) == count + 4
