"""`/v1/tokens`: what a prompt takes of what the model reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import pytest

from app.service import prompt_tokens
from tests.api.conftest import error_of

ROUTE = "/v1/tokens"


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """The tokenizer, which takes half a second to read, is the same in each test's app."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_tokens, "_read", cache(prompt_tokens._read))
        yield


async def test_a_prompt_is_counted(client) -> None:
    """With the limit, and the place of the cut where there is one."""
    answer = (await client.post(ROUTE, json={"prompt": "a red circle"})).json()
    assert answer == {"object": "tokens", "tokens": 15, "limit": 512, "cut_at": None}
    answer = (await client.post(ROUTE, json={"prompt": "word " * 600})).json()
    assert answer["tokens"] > answer["limit"]
    assert 0 < answer["cut_at"] < 5 * 600


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": 1}, "prompt", "invalid_type"),
        ({"prompt": ["a"]}, "prompt", "invalid_type"),
        ({"prompt": "a" * 32_001}, "prompt", "string_above_max_length"),
        ({"prompt": "a" * 100_000}, "prompt", "string_above_max_length"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": "a", "promt": "b"}, "promt", "unknown_parameter"),
        ({"prompt": "a", "model": "sdxl"}, "model", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_no_prompt_is_refused(client, body, param, code) -> None:
    """By name, with the codes of the routes that make pictures."""
    content = json.dumps(body).encode()
    answer = await client.post(ROUTE, content=content, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    assert (error_of(answer)["param"], error_of(answer)["code"]) == (param, code)


@pytest.mark.parametrize("prompt", ["", " ", "\n"])
async def test_a_blank_prompt_is_counted(client, prompt) -> None:
    """Nothing is drawn of it."""
    answer = await client.post(ROUTE, json={"prompt": prompt, "model": None})

    assert (answer.status_code, answer.json()["cut_at"]) == (200, None)


async def test_a_long_prompt_is_counted_however_it_is_written(client) -> None:
    """Escaped, each character of it takes six."""
    content = b'{"prompt": "' + rb"\u00e4" * 32_000 + b'"}'
    answer = await client.post(ROUTE, content=content, headers={"content-type": "application/json"})

    assert answer.status_code == 200


async def test_unknown_names_may_be_ignored(serve) -> None:
    """`KLEIN_UNKNOWN_FIELDS=ignore`."""
    client = await serve(unknown_fields="ignore")

    assert (await client.post(ROUTE, json={"prompt": "a", "promt": "b"})).status_code == 200
