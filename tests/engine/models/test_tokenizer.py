"""The tokenizer that comes with the package is Qwen's: the same files, the same ids."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from transformers import AddedToken, Qwen2Tokenizer

from app.engine.models.flux2_klein import KLEIN, TOKENIZER, TOKENIZER_WORDS
from app.engine.runtime import tokenizer as tokenizer_module
from app.engine.runtime.tokenizer import Tokenizer
from tests.support.long_form import one_of
from tools import make_tokenizer
from tools.random_weights import write_tokenizer

pytestmark = pytest.mark.torch

PUBLISHED = {file.path: file.sha256 for file in KLEIN.shared}
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def packaged():
    return Qwen2Tokenizer.from_pretrained(TOKENIZER, local_files_only=True)


def sha256(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def test_the_files_are_the_published_ones(packaged) -> None:
    """By the catalogue's hashes: the vocabulary, and the added tokens with their numbers."""
    for name in ("vocab.json", "merges.txt"):
        assert sha256((TOKENIZER / name).read_bytes()) == PUBLISHED[f"tokenizer/{name}"]
    added = {str(token): number for number, token in packaged.added_tokens_decoder.items()}
    written = json.dumps(dict(sorted(added.items())), indent=2) + "\n"
    assert sha256(written) == PUBLISHED["tokenizer/added_tokens.json"]
    assert (packaged.pad_token_id, len(packaged)) == (151_643, TOKENIZER_WORDS)
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    assert config == make_tokenizer.config()
    assert (TOKENIZER / "chat_template.jinja").read_text() == make_tokenizer.TEMPLATE


@pytest.mark.full
def test_it_is_the_published_tokenizer_bit_by_bit(packaged) -> None:
    """Saved in transformers' form, and with what its version 4 wrote there, it is the hub's file:
    normalization, splitting, merges, ids, and which tokens are special."""
    packed = json.loads(packaged.backend_tokenizer.to_str())
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    bytewise["use_regex"] = False
    packed["pre_tokenizer"]["pretokenizers"][1] = bytewise
    packed |= {"post_processor": bytewise, "decoder": bytewise}
    written = json.dumps(packed, ensure_ascii=False, indent=2)
    assert sha256(written) == PUBLISHED["tokenizer/tokenizer.json"]


@pytest.mark.parametrize("count", one_of(500, 10_000))
def test_ids_are_those_of_the_vocabulary(packaged, count) -> None:
    """Words, numbers, many scripts, white space, composed and split letters, added tokens."""
    right = Qwen2Tokenizer(str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"))
    right.add_tokens(
        [name for group in make_tokenizer.ADDED for name in group], special_tokens=True
    )
    strings = list(made_up(random.Random(16), count))
    assert len(set(strings)) > 0.95 * count
    assert packaged(strings).input_ids == right(strings).input_ids


def made_up(chance: random.Random, count: int):
    """Yield prompts of parts of every kind."""
    words = (ROOT / "docs" / "security.md").read_text().split()
    added = [name for group in make_tokenizer.ADDED for name in group]
    alphabets = [(0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF)]
    alphabets += [(0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    alphabets += [(0x1F300, 0x1FAFF), (0x9, 0xD)]
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 12)):
            low, high = chance.choice(alphabets)
            letters = [chr(chance.randint(low, high)) for _ in range(chance.randint(1, 6))]
            parts += [chance.choice((chance.choice(words), "".join(letters)))]
            parts += [chance.choice((" ", " ", "", "  ", "\n", "\r\n\n", str(chance.random())))]
            parts += [chance.choice(added)] if chance.random() < 0.1 else []
        yield "".join(parts)


def test_the_prompts_frame_is_the_models(packaged) -> None:
    """The chat template, and padding with the token that the model was trained with."""
    tokens = Tokenizer(packaged, 64)("a red circle")
    text = (
        "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert packaged.decode(tokens.ids) == text
    assert (tokens.length, tokens.padding) == (64, 151_643)
    assert tokens.ids[0] == 151_644


def test_a_prompt_becomes_what_the_pipeline_makes_of_it(packaged) -> None:
    """Its ids, cut, whatever the prompt holds; added tokens too, and halves of them at its ends."""
    tokenizer = Tokenizer(packaged, 64)
    assert tokenizer._tail
    ends = [
        "<|im_end|",
        "|>",
        "<",
        "<|im_end|><|im_end",
        "im_end|>\n",
        "</think",
        "a \n ",
        "\u0301",
    ]
    for prompt in [*made_up(random.Random(17), 200), *ends, *(each + "a" + each for each in ends)]:
        text = packaged.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        right = packaged(text).input_ids
        made = tokenizer(prompt)
        assert made.ids == right[:64]
        assert (made.count, made.is_cut) == (min(len(right), 64), len(right) > 64)


@pytest.mark.parametrize(
    ("kept", "token"),
    [
        (True, AddedToken("<|im|>", normalized=False)),
        (False, AddedToken("cat<|im_", normalized=False)),
        (False, AddedToken("<|im_end|>\n", normalized=True)),
        (False, AddedToken("<|im_end|>\n", normalized=False, lstrip=True)),
        (False, AddedToken("<|im_end|>\n", normalized=False, single_word=True)),
    ],
)
def test_what_stands_after_a_prompt_is_tokenized_once(tmp_path, monkeypatch, kept, token) -> None:
    """Unless a token of its own reads the prompt's end and it together, whatever prompts come.

    Not only where the prompts that are tried show it.
    """
    monkeypatch.setattr(tokenizer_module, "_SAMPLES", ("A.",))
    write_tokenizer(tmp_path)
    other = Qwen2Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    other.add_tokens([token])
    tokenizer = Tokenizer(other, 256)

    assert (tokenizer._tail is not None) == kept
    for prompt in ("a fox", "a fox ", "a fox\n", "fox<|im_", "a cat", "A."):
        text = prompt.join(tokenizer._frame)
        assert tokenizer(prompt).ids == other(text).input_ids


def test_a_template_that_changes_prompts_is_rendered_for_each(packaged, monkeypatch) -> None:
    """Another model's may cut white space; the prompt's frame is then not taken as fixed."""
    monkeypatch.setattr(
        packaged, "chat_template", packaged.chat_template.replace("content", "content | trim")
    )
    tokens = Tokenizer(packaged, 64)("  a red circle ")

    assert "user\na red circle<" in packaged.decode(tokens.ids)


def test_its_makers_are_named() -> None:
    """In the file that wheel and image carry."""
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    assert "Qwen" in notice
    assert "Apache License, Version 2.0" in notice
    assert TOKENIZER.relative_to(ROOT).as_posix() in notice
    assert 'license-files = ["LICENSE", "NOTICE"]' in (ROOT / "pyproject.toml").read_text()
