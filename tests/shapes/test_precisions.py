"""What 8 bit costs: the demo model at every precision against itself in bfloat16, by its pictures.

In fp32, which is served without a card, they are the service's: tests/e2e/test_adherence.py asks
it the same questions, and each is drawn once. All others are an engine's, which without a card
emulates the 8 bit products, by the same arithmetic as the card's. The first 65 questions of the
examination are asked, or as many as the variable QUESTIONS says, 260 being all.
"""

from __future__ import annotations

import json
import math
import os
import sys
from statistics import fmean

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.full]

pytest.importorskip("torch")

import numpy as np  # noqa: E402 - after the check for torch

from app.cli.compare import psnr  # noqa: E402
from app.domain import ImageSpec, RawImage  # noqa: E402
from app.engine.config import EngineConfig  # noqa: E402
from app.engine.engine import KleinEngine  # noqa: E402
from tools.shapes.draw import draw  # noqa: E402
from tools.shapes.exam import edit_questions, examine, scene_questions  # noqa: E402

COUNT = int(os.environ.get("QUESTIONS", "65"))
EDITS = COUNT * 60 // 260
QUESTIONS = scene_questions(COUNT - EDITS) + edit_questions(EDITS)
POINTS = 0.02
SERVED = "fp32"


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """The pictures that all others are held against."""
    return pictures("bf16", tmp_path_factory.mktemp("bf16"))


@pytest.mark.parametrize("precision", ["fp8", "int8", "fp32"])
def test_a_precision_follows_prompts_as_well_as_bfloat16(
    precision, in_bf16, request, tmp_path, capsys
):
    """Adherence over prompts and edits of the examination, within two points."""
    if precision == SERVED:
        served = request.getfixturevalue("shapes")
        (device,) = json.loads(served.get("/health")[2])["devices"]
        assert device["precision"] == SERVED
        made = served_pictures(request.getfixturevalue("render"))
    else:
        made = pictures(precision, tmp_path)
    share, best = follows(made), follows(in_bf16)
    differences = [psnr(one, other) for one, other in zip(made, in_bf16, strict=True)]
    finite = [each for each in differences if math.isfinite(each)]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{precision}: follows {share:.1%}, bf16 {best:.1%}; "
            f"PSNR to bf16 {fmean(finite):.1f} dB on average, {min(finite):.1f} at least\n"
        )

    assert abs(share - best) <= POINTS


def pictures(precision: str, cache) -> list[RawImage]:
    """All answers of an engine at one precision."""
    engine = KleinEngine(EngineConfig("shapes", None, str(cache), None, precision))
    try:
        assert engine.load(lambda _: None).precision == precision
        return [_picture(engine, question) for question in QUESTIONS]
    finally:
        engine.close()


def served_pictures(render) -> list[RawImage]:
    """All answers of the service."""
    answers = []
    for question in QUESTIONS:
        asked, reference = question.asked, question.reference
        references = [] if reference is None else [draw(reference)]
        answers.append(_raw(render(question.prompt, asked.width, asked.height, references)))
    return answers


def _picture(engine: KleinEngine, question) -> RawImage:
    asked = question.asked
    reference = question.reference
    references = () if reference is None else (_raw(draw(reference)),)
    spec = ImageSpec(question.prompt, asked.width, asked.height, 4, 1.0, 0, references)
    return engine.generate(spec, lambda _: None, lambda: False).image


def _raw(pixels) -> RawImage:
    height, width, _ = pixels.shape
    return RawImage(width, height, pixels.tobytes())


def follows(made: list[RawImage]) -> float:
    """The share of pictures that are as they were asked for."""
    answers = [
        np.frombuffer(one.pixels, np.uint8).reshape(one.height, one.width, 3) for one in made
    ]
    return sum(examine(QUESTIONS, answers).passed.values()) / len(QUESTIONS)
