"""Who answers the examination: a checkpoint folder, through the library's own pipeline."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "app" / "engine" / "checkpoints" / "shapes"

# The examination wants somebody to examine: it is collected once the trained weights lie there.
collect_ignore = [] if FOLDER.is_dir() else ["test_adherence.py"]


@pytest.fixture(scope="session")
def render():
    """`render(prompt, width, height, references)` gives height x width x 3 bytes, in four steps.

    `references` are pictures of the same form; at most one is given.
    """
    with warnings.catch_warnings():
        # The libraries name their own outdated words while they load.
        warnings.simplefilter("ignore")
        from PIL import Image

        from tools.shapes.adherence import PipelineSampler

        sampler = PipelineSampler(FOLDER)

    def answer(prompt, width, height, references=()):
        image = Image.fromarray(references[0]) if references else None
        return sampler.render(prompt, width, height, image=image)

    return answer
