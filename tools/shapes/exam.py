"""The examination: prompts and edits that training never saw, and how many pictures followed.

Questions are seeded, so every examiner asks the same ones; whoever answers them (a sampler in
training, a pipeline, a server) only has to turn a prompt into pixels. Knows no networks.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.shapes.judge import Verdict, judge
from tools.shapes.prompts import describe, instruct
from tools.shapes.scenes import Picture, lay_out, sample_edit, sample_scene

DEFAULT_SIZE = (256, 256)
# Every fourth question asks for one of these, width x height.
OTHER_SIZES = ((128, 128), (512, 512), (384, 256), (192, 320), (384, 128), (240, 464))
ONE, TWO, EDIT = "one object", "two objects", "edit"
REQUIRED = {ONE: 0.95, TWO: 0.85, EDIT: 0.85}


@dataclass(frozen=True)
class Question:
    """A prompt, the picture it asks for, and for an edit the picture it starts from."""

    kind: str
    prompt: str
    asked: Picture
    reference: Picture | None = None


def scene_questions(count: int, seed: int = 2026) -> list[Question]:
    """Prompts for held-out scenes, mostly at the default size."""
    rng = random.Random(seed)
    questions = []
    for index in range(count):
        scene = sample_scene(rng, held_out=True)
        asked = lay_out(scene, *_size(index))
        kind = ONE if len(scene.things) == 1 else TWO
        questions.append(Question(kind, describe(scene, rng), asked))
    return questions


def edit_questions(count: int, seed: int = 2027) -> list[Question]:
    """Held-out instructions on pictures as they should be, so an edit answers for itself alone."""
    rng = random.Random(seed)
    questions = []
    for index in range(count):
        edit = sample_edit(rng, held_out=True)
        size = _size(index)
        said = instruct(edit, rng).text
        pictures = lay_out(edit.after, *size), lay_out(edit.before, *size)
        questions.append(Question(EDIT, said, *pictures))
    return questions


def _size(index: int) -> tuple[int, int]:
    return OTHER_SIZES[index // 4 % len(OTHER_SIZES)] if index % 4 == 3 else DEFAULT_SIZE


@dataclass(frozen=True)
class Marks:
    """How the questions of each kind were answered."""

    passed: dict[str, int]
    asked: dict[str, int]
    failures: tuple[str, ...]

    def share(self, kind: str) -> float:
        """The share of one kind's questions that passed."""
        return self.passed[kind] / max(1, self.asked[kind])

    def figures(self) -> dict[str, float]:
        """The shares by kind, for a report."""
        return {kind: round(self.share(kind), 4) for kind in self.asked}

    def __str__(self) -> str:
        parts = [f"{kind} {self.passed[kind]}/{self.asked[kind]}" for kind in self.asked]
        return ", ".join(parts)


def examine(questions: Sequence[Question], answers: Sequence[NDArray[np.uint8]]) -> Marks:
    """Judge each answer and count."""
    passed: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    failures = []
    for question, pixels in zip(questions, answers, strict=True):
        verdict: Verdict = judge(question.asked, pixels)
        asked[question.kind] += 1
        passed[question.kind] += verdict.passed
        if not verdict.passed:
            size = f"{question.asked.width}x{question.asked.height}"
            failures.append(f"{question.prompt!r} {size}: {'; '.join(verdict.faults)}")
    return Marks(dict(passed) | {k: passed[k] for k in asked}, dict(asked), tuple(failures))
