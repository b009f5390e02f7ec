"""The sentences that the program can print, read from its source, and those that a guide quotes.

A guide quotes in a Markdown block quote, one sentence or more in each, and sets in italics what
differs from case to case: `> The queue is full; try again in *5* s.` A sentence of the source has
holes where a value comes in (f-strings, `%`, `str.format`). A quotation is the program's where it
equals a sentence whose holes are filled with values in italics or with other sentences.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.sources import tree_of

ROOT = Path(__file__).resolve().parents[2]

HOLE = "\0"
_LEAST = 5
"""Letters that a sentence, or a part that fills a hole, has of its own."""
_DEPTH = 3
_CONVERSION = re.compile(r"%[-+# 0]*\d*(?:\.\d+)?[sdrfgeixX]|\{[\w.]*(?::[^{}]*)?\}")
_TOUCHING = re.compile(rf"{HOLE}(?:[.x:/,]?{HOLE})+")
_VALUE = re.compile(r"(?<![\w*])\*([^*\n]+)\*(?![\w*])")


def quotations(page: str) -> list[str]:
    """The block quotes of a page, each in one line."""
    blocks = re.findall(r"(?:^> ?.*\n?)+", page, re.M)
    return [" ".join(re.sub(r"^> ?", "", each, flags=re.M).split()) for each in blocks]


def pattern_of(quotation: str) -> str:
    """The quotation with holes instead of its values."""
    return _join(_VALUE.sub(HOLE, quotation))


@cache
def trees() -> dict[Path, ast.Module]:
    """The program's source."""
    return {path: tree_of(path) for path in sorted((ROOT / "app").rglob("*.py"))}


@cache
def sentences() -> frozenset[str]:
    """Every text of the program that could be a sentence, with holes; docstrings are none."""
    found = {_join(text) for tree in trees().values() for text in _texts(tree)}
    return frozenset(each for each in found if _letters(each) >= _LEAST)


def is_printed(quotation: str) -> bool:
    """Whether the program has this sentence, or makes it of two or three that it has."""
    text = pattern_of(quotation)
    return _is_made(text, _DEPTH) or any(
        _is_made(text[: space.start()], 1) and _is_end(text[space.end() :])
        for space in re.finditer(" ", text)
    )


def _is_end(text: str) -> bool:
    """Whether it is a sentence, or one to which whoever joins the two adds the full stop."""
    return any(_is_made(each, 1) for each in {text, text.removesuffix(".")})


@cache
def _is_made(text: str, depth: int) -> bool:
    if text in sentences():
        return True
    if depth == 0:
        return False
    return any(
        all(_fills(part, depth - 1) for part in found.groups())
        for each in sentences()
        if HOLE in each
        and all(piece in text for piece in each.split(HOLE))
        and (found := _compiled(each).fullmatch(text))
    )


def _fills(part: str, depth: int) -> bool:
    """A value in italics, or nothing, or what the program says itself."""
    return part in ("", HOLE) or _is_made(part, depth)


@cache
def _compiled(sentence: str) -> re.Pattern[str]:
    return re.compile("(.*?)".join(map(re.escape, sentence.split(HOLE))), re.S)


def _texts(tree: ast.Module) -> Iterator[str]:
    joined: list[ast.JoinedStr] = []
    plain: list[ast.Constant] = []
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                plain.append(node)
        elif isinstance(node, ast.JoinedStr):
            joined.append(node)
            skipped |= {id(part) for part in node.values}
        elif (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        ):
            skipped.add(id(node.body[0].value))
    for node in joined:
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values
        )
    for node in plain:
        if id(node) not in skipped:
            yield _CONVERSION.sub(HOLE, str(node.value))


def _join(text: str) -> str:
    """One hole for several that touch, and one space for several."""
    return _TOUCHING.sub(HOLE, " ".join(text.split()))


def _letters(text: str) -> int:
    return sum(each.isalpha() for each in text)
