"""Nobody is kept out by who asks more often: one key on 24 sockets, another that asks politely."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.chaos import Answer, ask, port_of, request_bytes

KEYS = ("greedy-key-1234", "polite-key-5678")
POLITE_S = 0.4
ASKS = 20


def keyed(key: str) -> bytes:
    """A small picture, asked for with *key*."""
    data = request_bytes("/generate", {"prompt": "x", "width": 128, "height": 128})
    return data.replace(b"\r\n", f"\r\nAuthorization: Bearer {key}\r\n".encode(), 1)


@pytest.mark.system
@pytest.mark.parametrize(("workers", "slow_s"), [(1, 0.16), (3, 0.48)])
def test_who_asks_politely_is_served_beside_24_sockets_that_never_stop(
    scripted, workers: int, slow_s: float
) -> None:
    """A picture each 0.16 s, by one worker or by three, and a queue of eight. The greedy key asks
    again on each socket as soon as it was answered; the polite one twenty times, every 0.4 s, and
    is served at least once of any
    three. Whatever is accepted of either is answered with a picture, and both get some."""
    device = f"cpu:{workers}"
    server = scripted(f"slow={slow_s}", queue_images=8, api_keys=",".join(KEYS), device=device)
    server.wait_until_ready()
    port, greedy = port_of(server), []

    async def insist(is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            greedy.append(await ask(port, keyed(KEYS[0])))
            await asyncio.sleep(0.02)

    async def run() -> list[Answer]:
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(24):
                group.create_task(insist(is_over))
            await asyncio.sleep(2.0)
            asking = []
            for _ in range(ASKS):
                asking.append(asyncio.create_task(ask(port, keyed(KEYS[1]))))
                await asyncio.sleep(POLITE_S)
            polite = await asyncio.gather(*asking)
            is_over.set()
        return polite

    polite = asyncio.run(run())
    served = [answer.status == 200 for answer in polite]

    assert {answer.status for answer in polite + greedy} <= {200, 503}
    assert all(any(served[i : i + 3]) for i in range(ASKS - 2)), served
    assert sum(answer.status == 200 for answer in greedy) > ASKS
