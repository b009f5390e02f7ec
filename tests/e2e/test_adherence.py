"""The demo model draws what its prompt says: prompts and edits that training never saw.

`.ci/run` asks them all. Each test asserts the shares that it prints.
"""

from __future__ import annotations

import sys

import pytest

from tools.shapes.scenes import Scene, Thing, lay_out

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]

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


@pytest.fixture(scope="module")
def exam():
    """The examination, whose judge needs torch: it is imported by who asks, not by who collects."""
    from tools.shapes import exam

    return exam


@pytest.fixture
def ask(exam, render, capsys):
    """Examine the service, and print how it went past pytest's capture."""
    from tools.shapes.draw import draw

    def ask(questions):
        answers = [
            render(
                question.prompt,
                question.asked.width,
                question.asked.height,
                [draw(question.reference)] if question.reference else [],
            )
            for question in questions
        ]
        marks = exam.examine(questions, answers)
        with capsys.disabled():
            sys.stdout.write(f"\nadherence: {marks}\n")
        return marks

    return ask


@pytest.mark.full
@pytest.mark.parametrize("prompt", FIRST_TRIES)
def test_first_tries(prompt, exam, ask):
    """What a newcomer types first is drawn as it should be."""
    asked = lay_out(FIRST_TRIES[prompt], 256, 256)

    marks = ask([exam.Question(exam.ONE, prompt, asked)])

    assert marks.share(exam.ONE) == 1, marks.failures


@pytest.mark.full
def test_prompts_with_one_object(exam, ask):
    """Of two hundred prompts never seen in training, those with one object."""
    questions = [each for each in exam.scene_questions(200) if each.kind == exam.ONE]
    marks = ask(questions)

    assert marks.asked[exam.ONE] >= 60
    assert marks.share(exam.ONE) >= exam.REQUIRED[exam.ONE], marks.failures


@pytest.mark.full
def test_prompts_with_two_objects(exam, ask):
    """Of the same two hundred, those with two."""
    questions = [each for each in exam.scene_questions(200) if each.kind == exam.TWO]
    marks = ask(questions)

    assert marks.asked[exam.TWO] >= 60
    assert marks.share(exam.TWO) >= exam.REQUIRED[exam.TWO], marks.failures


@pytest.mark.full
def test_edits(exam, ask):
    """Sixty edits never seen in training: recoloured, replaced, on another background."""
    marks = ask(exam.edit_questions(60))

    assert marks.share(exam.EDIT) >= exam.REQUIRED[exam.EDIT], marks.failures
