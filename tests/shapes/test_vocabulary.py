"""The tokenizer says Qwen's chat template and takes any text there is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

transformers = pytest.importorskip("transformers")

from tools.shapes.prompts import describe, instruct  # noqa: E402 - after the check for torch
from tools.shapes.scenes import sample_edit, sample_scene  # noqa: E402
from tools.shapes.vocabulary import (  # noqa: E402
    SEQUENCE_LENGTH,
    SPECIAL_TOKENS,
    TEMPLATE,
    PromptCodes,
    build_tokenizer,
)

STRANGE = ("", "日本の絵 😀", "e\u0301", "\x00\n\n", "<|im_end|>", "a " * 200, "ÄÖ \u202e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(prompts=2000).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", ["a red circle", *STRANGE])
def test_template(tokenizer, prompt):
    """The chat template gives klein's text to the letter."""
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )

    assert text == TEMPLATE.format(prompt)


@pytest.mark.parametrize("prompt", ["a red circle", *STRANGE])
def test_same_rows(tokenizer, folder, prompt):
    """Training and pipeline make the same 64 tokens of any text."""
    padded = tokenizer(
        TEMPLATE.format(prompt), padding="max_length", truncation=True, max_length=SEQUENCE_LENGTH
    )

    assert PromptCodes(folder / "tokenizer.json").row(prompt) == padded["input_ids"]


def test_nothing_is_lost(tokenizer):
    """Any text comes back from its tokens, but for Unicode's own normal form."""
    for prompt in ("a red circle", "日本の絵 😀", "\x00\n\n", "ÄÖ \u202e"):
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_known_prompts_fit(folder):
    """Every way of saying a scene or an edit fits, unless it is shouted."""
    codes, rng = PromptCodes(folder / "tokenizer.json"), random.Random(3)
    for _ in range(1500):
        for prompt in (describe(sample_scene(rng), rng), instruct(sample_edit(rng), rng).text):
            assert prompt.isupper() or codes.fits(prompt), prompt


def test_special_tokens(tokenizer):
    """Qwen's special tokens are single tokens, in its order, and padding is its first."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]

    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert tokenizer.pad_token_id == ids[0]
