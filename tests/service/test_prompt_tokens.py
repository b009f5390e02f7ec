"""The count of a prompt's tokens is the worker's, and says where it will be cut."""

from __future__ import annotations

import asyncio
import threading

import pytest

from app.engine.models.flux2_klein import TOKENIZER
from app.engine.models.registry import find_model
from app.errors import Unavailable
from app.service import prompt_tokens as module
from app.service.prompt_tokens import MOST_WAITING, PromptTokens

SHAPES = find_model("shapes").folder / "tokenizer"
PROMPTS = [
    "",
    "a red circle on a blue background",
    "  spaces,\n\nlines and\ttabs  ",
    "Größe 12345, it's naïve: e\u0301 漢字 🦊🏽 <|im_end|> <think>",
    "word " * 1000,
]


@pytest.fixture(scope="module")
def tokens():
    """klein's, whose model reads 512."""
    counter = PromptTokens(TOKENIZER, 512)
    yield counter
    counter.close()


@pytest.mark.torch
@pytest.mark.parametrize("folder", [TOKENIZER, SHAPES], ids=["klein", "shapes"])
async def test_it_counts_as_the_worker_does(folder) -> None:
    """Tokens, and whether it is cut, of each prompt."""
    from app.engine.pipeline.build import _read_tokenizer

    cut = _read_tokenizer(folder, 512)
    tokens = PromptTokens(folder, 512)
    counted = [await tokens.count(prompt) for prompt in PROMPTS]
    tokens.close()

    right = [cut(prompt) for prompt in PROMPTS]
    assert [min(each.tokens, 512) for each in counted] == [each.count for each in right]
    assert [each.cut_at is not None for each in counted] == [each.is_cut for each in right]


async def test_the_place_of_the_cut_is_where_reading_ends(tokens) -> None:
    """What stands before it fits, and one word more does not."""
    prompt = "word " * 1000
    counted = await tokens.count(prompt)
    assert counted.cut_at is not None
    # The template takes three tokens before the prompt.
    assert counted.cut_at == len("word " * 509) - 1
    assert (await tokens.count("word " * 400)).cut_at is None


async def test_few_wait_for_a_count(tokens, monkeypatch) -> None:
    """A client that sends thousands holds neither memory nor threads."""
    go = threading.Event()
    monkeypatch.setattr(module.PromptTokens, "_count", lambda *_: go.wait(10))
    waiting = [asyncio.ensure_future(tokens.count("a")) for _ in range(MOST_WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await tokens.count("a")
    go.set()
    await asyncio.gather(*waiting)
