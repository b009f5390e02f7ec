"""docs/troubleshooting.md says what the program says: its sentences, its error codes."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

import pytest

from app.api.errors import REPLIES
from app.api.http_limits.refusals import Unreadable
from app.errors import Kind
from app.images.formats import OUTPUT_FORMATS
from tests.docs import sentences

GUIDES = ("getting-started.md", "operations.md", "troubleshooting.md")
PAGE = (sentences.ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = [
    (guide, quotation)
    for guide in GUIDES
    for quotation in sentences.quotations((sentences.ROOT / "docs" / guide).read_text())
]
_WORDS = re.compile(r"[a-z]+(_[a-z]+)+")
_CODE = re.compile(
    r"(invalid|missing|unknown|unsupported)_[a-z]+|[a-z_]+_(not_found|reused|max_length)"
)


@pytest.mark.parametrize(("guide", "quotation"), QUOTED)
def test_what_a_guide_quotes_is_what_the_program_prints(guide, quotation):
    """But for the values in italics; a sentence that was changed in the source is changed here."""
    assert sentences.is_printed(quotation)


@pytest.mark.parametrize(
    ("quotation", "is_printed"),
    [
        ("The queue is full; try again in *5* s.", True),
        ("The queue is full; try again in 5 s.", False),
        ("The queue is quite full; try again in *5* s.", False),
        ("*The queue is full*; come again in *5* s.", False),
        ("A sentence of nobody's.", False),
        ("*Anything*", False),
    ],
)
def test_what_the_program_does_not_print_is_seen(quotation, is_printed):
    """A changed word, a value that is not marked, or nothing but a value."""
    assert sentences.is_printed(quotation) is is_printed


def codes() -> dict[str, set[int]]:
    """Each error code with its statuses, from the table of replies and from where it is raised."""
    found: dict[str, set[int]] = defaultdict(set)
    for reply in REPLIES.values():
        found[reply.code].add(reply.status)
    found[REPLIES[Kind.INVALID].code] |= own_statuses()
    for path, tree in sentences.trees().items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                given = {each.arg: each.value for each in call.keywords}
                kind = given.get("kind")
                status = REPLIES[
                    Kind[kind.attr] if isinstance(kind, ast.Attribute) else Kind.INVALID
                ]
                for name in filter(_WORDS.fullmatch, texts(given.get("code"))):
                    found[name].add(status.status)
        # Some are handed on by position, as those of pictures are.
        if path.is_relative_to(sentences.ROOT / "app" / "images"):
            for name in filter(_CODE.fullmatch, texts(tree)):
                found[name].add(REPLIES[Kind.INVALID].status)
    return found


def own_statuses() -> set[int]:
    """What is answered instead of 400 where no request could be read; the code is the same."""
    calls = (
        each
        for tree in sentences.trees().values()
        for each in ast.walk(tree)
        if isinstance(each, ast.Call) and getattr(each.func, "id", "") == Unreadable.__name__
    )
    given = (each for call in calls for each in call.keywords if each.arg == "status")
    return {ast.literal_eval(each.value) for each in given}


def texts(tree: ast.AST | None) -> list[str]:
    """The texts in a part of the source; in a code's hole stands a format without quality."""
    if isinstance(tree, ast.JoinedStr):
        lossless = [each.name for each in OUTPUT_FORMATS.values() if not each.has_quality]
        parts = [
            "{}" if isinstance(each, ast.FormattedValue) else each.value for each in tree.values
        ]
        return ["".join(parts).format(name) for name in lossless]
    nodes = ast.walk(tree) if tree else ()
    return [
        each.value
        for each in nodes
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]


def test_every_error_code_has_its_row():
    """With the statuses that it comes with, and no row has a code that nobody sends."""
    table = PAGE.partition("## Every error code")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d, ]+) \|", table, re.M))

    assert {code: {int(each) for each in said.split(",")} for code, said in rows.items()} == codes()


def test_every_reason_of_a_503_has_its_row():
    """Those of `klein_requests_rejected_total`; a rate that is exceeded is no 503."""
    section = PAGE.partition("### 503\n")[2].partition("\n### ")[0]
    reasons = {reply.reason for reply in REPLIES.values() if reply.status == 503}

    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == reasons
    for quoted in re.findall(r'"([^"]+)"', section):
        assert sentences.is_printed(quoted), quoted
