"""Qwen's tokenizer and the chat template that the model was trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt: its *ids*, at most *length*, to which the id *padding* fills them up.

    *is_cut* says whether the prompt was truncated.
    """

    ids: list[int]
    length: int
    padding: int
    is_cut: bool

    @property
    def count(self) -> int:
        """Return how many tokens there are, without padding."""
        return len(self.ids)


class Tokenizer:
    """Applies the chat template of transformers' *tokenizer*, tokenizes and truncates.

    The ids are those of `Flux2KleinPipeline`, for a sequence of *max_length* tokens. The GPU waits
    for them, and on a processor that has just slept each call of a library takes several times as
    long as in a loop: so few calls are made.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._frame = _find_frame(self._render)
        # Both are looked up anew at each access.
        self._backend = tokenizer.backend_tokenizer
        self._padding = int(tokenizer.pad_token_id)
        self._tail = None if self._frame is None else self._find_tail(*self._frame)

    def __call__(self, prompt: str) -> Tokens:
        """Tokenize *prompt*."""
        if self._frame is None:
            ids = self._encode(self._render(prompt))
        elif self._tail is None:
            ids = self._encode(prompt.join(self._frame))
        else:
            ids = self._encode(self._frame[0] + prompt) + self._tail
        kept = ids[: self.max_length]
        return Tokens(kept, self.max_length, self._padding, is_cut=len(ids) > len(kept))

    def _encode(self, text: str) -> list[int]:
        # What the tokenizer's own `__call__` does around this takes as long again.
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def _find_tail(self, before: str, after: str) -> list[int] | None:
        """Return the ids of *after* where they are the same after any prompt; else None.

        They are where it begins with a token that is looked for before all else and takes nothing
        from the prompt, where no such token can begin in the prompt and end in *after*, and where
        none at the prompt's end depends on what comes next.
        """
        is_plain = after[:1].isalnum() or after[:1].isspace() or after.startswith("_")
        if is_plain or self._backend.encode_special_tokens:
            return None
        added = self._backend.get_added_tokens_decoder().values()
        first = [each for each in added if after.startswith(each.content)]
        if not first or any(each.normalized or each.lstrip or each.single_word for each in first):
            return None
        if any(_overlaps(each.content, after) for each in added):
            return None
        tail = self._encode(after)
        for each in _SAMPLES:
            if self._encode(before + each + after) != self._encode(before + each) + tail:
                return None
        return tail

    def _render(self, prompt: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return text


def _overlaps(token: str, after: str) -> bool:
    """Return whether *token* may begin before *after* and end in it."""
    return any(after.startswith(token[place:]) for place in range(1, len(token)))


_SAMPLES = ("a fox", " \n two\n\n words ", "<tool_response>a</tool_response>", "{{ a }} {% b %}")
"""Prompts that a template might change or look into."""


def _find_frame(render: Callable[[str], str]) -> tuple[str, str] | None:
    """Return what the chat template puts before and after a prompt; None where that varies.

    To render it anew takes a quarter of a millisecond, several times what the tokens take.
    """
    mark = "\N{REPLACEMENT CHARACTER}"
    before, _, after = render(mark).partition(mark)
    is_fixed = all(render(each) == before + each + after for each in _SAMPLES)
    return (before, after) if is_fixed else None
