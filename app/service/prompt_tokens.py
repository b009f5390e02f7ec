"""How many tokens a prompt has, and from where on the model will not read it.

It is the worker's tokenizer once more, without torch, so that the answer comes at once, and while
the worker sleeps. It is read when it is first asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from app.errors import Kind, Unavailable

_log = logging.getLogger(__name__)

_BEFORE = "<|im_start|>user\n"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Qwen3's chat template around a prompt, without thinking (`app.engine.runtime.tokenizer`)."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: what is never merged into one token."""
MOST_WAITING = 16

_UNREAD = "The tokenizer's files are missing or cannot be read; the service's log says which."
_UNREAD_S = 30


@dataclass(frozen=True, slots=True)
class Counted:
    """What the model reads of a prompt."""

    tokens: int
    """With the chat template around the prompt."""
    limit: int
    cut_at: int | None
    """The first character that is not read; None where all are."""


class PromptTokens:
    """Counts with the tokenizer in *folder*; the model reads *limit* tokens."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._tokenizer: Tokenizer | None = None
        self._thread = ThreadPoolExecutor(1, "tokens")
        self._waiting = 0

    async def count(self, prompt: str) -> Counted:
        """Count the tokens of *prompt*.

        Raises:
            Unavailable: too many wait for that already, or the tokenizer's files are missing.
        """
        if self._waiting >= MOST_WAITING:
            raise Unavailable.because("Too many prompts are being counted", Kind.QUEUE_FULL, 1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._count, prompt
            )
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _count(self, prompt: str) -> Counted:
        if self._tokenizer is None:
            self._tokenizer = self._read()
        offsets = self._tokenizer.encode(_BEFORE + prompt + _AFTER).offsets
        cut_at = None
        if len(offsets) > self._limit:
            cut_at = min(max(offsets[self._limit][0] - len(_BEFORE), 0), len(prompt))
        return Counted(len(offsets), self._limit, cut_at)

    def _read(self) -> Tokenizer:
        try:
            return _read(self._folder)
        except Exception as error:  # The library raises no other.
            _log.error("The tokenizer in %s cannot be read: %s", self._folder, error)
            raise Unavailable(_UNREAD, kind=Kind.WORKER_DOWN, retry_after_s=_UNREAD_S) from None


def _read(folder: Path) -> Tokenizer:
    """Read it whole, or from the words and merges of Qwen2's, as transformers does."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        return Tokenizer.from_file(str(whole))
    made = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    added = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
    for _, token in added:
        made.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
    return made
