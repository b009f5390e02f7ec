"""Two clients of one site: one that never stops asking, and one that asks now and then."""

from __future__ import annotations

import asyncio

from tests.support.chaos import Answer, ask, request_bytes

SMALL = {"prompt": "a fox", "width": 128, "height": 128}
KEYS = ("greedy-key-1234", "polite-key-5678")
POLITE_S, ASKS = 0.6, 10
PICTURE_S = 0.4


def keyed(key: str) -> bytes:
    """A small picture, asked for with *key*."""
    data = request_bytes("/generate", SMALL)
    return data.replace(b"\r\n", f"\r\nAuthorization: Bearer {key}\r\n".encode(), 1)


async def beside_greedy(port: int) -> tuple[list[Answer], list[Answer]]:
    """The polite key asks every 0.6 s, the greedy one on 24 sockets as soon as it is answered."""
    greedy: list[Answer] = []

    async def insist(is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            greedy.append(await ask(port, keyed(KEYS[0])))
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        is_over = asyncio.Event()
        for _ in range(24):
            group.create_task(insist(is_over))
        await asyncio.sleep(1.0)
        asking = []
        for _ in range(ASKS):
            asking.append(group.create_task(ask(port, keyed(KEYS[1]))))
            await asyncio.sleep(POLITE_S)
        polite = await asyncio.gather(*asking)
        is_over.set()
    return list(polite), greedy
