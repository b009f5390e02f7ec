"""`/v1/tokens`: what a prompt takes of what the model reads."""

from __future__ import annotations

import pytest


async def test_a_prompt_is_counted(client) -> None:
    """With the limit, and the place of the cut where there is one."""
    answer = (await client.post("/v1/tokens", json={"prompt": "a red circle"})).json()
    assert answer == {"object": "tokens", "tokens": 15, "limit": 512, "cut_at": None}
    answer = (await client.post("/v1/tokens", json={"prompt": "word " * 600})).json()
    assert answer["tokens"] > answer["limit"]
    assert 0 < answer["cut_at"] < 5 * 600


@pytest.mark.parametrize(
    "body", [{}, {"prompt": None}, {"prompt": ["a"]}, {"prompt": "a" * 32_001}]
)
async def test_what_is_no_prompt_is_refused(client, body) -> None:
    """By name."""
    answer = await client.post("/v1/tokens", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
