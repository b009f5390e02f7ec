"""The demo model draws what its prompt says: prompts and edits that training never saw.

`make test` asks a sample, `.ci/run` all of it. Each test asserts the shares that it prints.
"""

from __future__ import annotations

import sys

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]

pytest.importorskip("torch")

from tools.shapes.draw import draw  # noqa: E402 - after the check for torch
from tools.shapes.exam import (  # noqa: E402
    EDIT,
    ONE,
    REQUIRED,
    TWO,
    Question,
    edit_questions,
    examine,
    scene_questions,
)
from tools.shapes.scenes import Scene, Thing, lay_out  # noqa: E402

# README's examples and what anybody tries first, whether or not training saw them.
FIRST_TRIES = {
    "a red circle": Scene((Thing("circle", "red"),)),
    "Blue star.": Scene((Thing("star", "blue"),)),
    "a red circle on a blue background": Scene((Thing("circle", "red"),), "blue"),
    "a small green star in the top left": Scene((Thing("star", "green", "small", "top left"),)),
    "a red circle left of a blue square": Scene(
        (Thing("circle", "red", place="left"), Thing("square", "blue", place="right"))
    ),
}


def ask(questions, render, capsys):
    """Examine whoever renders, and print how it went past pytest's capture."""
    answers = [
        render(
            question.prompt,
            question.asked.width,
            question.asked.height,
            [draw(question.reference)] if question.reference else [],
        )
        for question in questions
    ]
    marks = examine(questions, answers)
    with capsys.disabled():
        sys.stdout.write(f"\nadherence: {marks}\n")
    return marks


@pytest.mark.full
@pytest.mark.parametrize("prompt", FIRST_TRIES)
def test_first_tries(prompt, render, capsys):
    """What a newcomer types first is drawn as it should be."""
    asked = lay_out(FIRST_TRIES[prompt], 256, 256)

    marks = ask([Question(ONE, prompt, asked)], render, capsys)

    assert marks.share(ONE) == 1, marks.failures


@pytest.mark.slow
def test_sample(render, capsys):
    """Of twenty prompts never seen in training, at most three fail."""
    marks = ask(scene_questions(20), render, capsys)

    assert sum(marks.passed.values()) >= 17, marks.failures


@pytest.mark.full
def test_prompts_with_one_object(render, capsys):
    """Of two hundred prompts never seen in training, those with one object."""
    questions = [each for each in scene_questions(200) if each.kind == ONE]
    marks = ask(questions, render, capsys)

    assert marks.asked[ONE] >= 60
    assert marks.share(ONE) >= REQUIRED[ONE], marks.failures


@pytest.mark.full
def test_prompts_with_two_objects(render, capsys):
    """Of the same two hundred, those with two."""
    questions = [each for each in scene_questions(200) if each.kind == TWO]
    marks = ask(questions, render, capsys)

    assert marks.asked[TWO] >= 60
    assert marks.share(TWO) >= REQUIRED[TWO], marks.failures


@pytest.mark.full
def test_edits(render, capsys):
    """Sixty edits never seen in training: recoloured, replaced, on another background."""
    marks = ask(edit_questions(60), render, capsys)

    assert marks.share(EDIT) >= REQUIRED[EDIT], marks.failures
