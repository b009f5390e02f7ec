"""Clients take turns: nobody waits for all that another has sent."""

from __future__ import annotations

import asyncio
import random

from app.images.turns import Turns


class Visitors:
    """Hold places until they are told to leave, and note who came in."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.inside: list[tuple[str, asyncio.Event]] = []
        self.came: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, client: str) -> asyncio.Task[None]:
        """Let one of *client* ask for a place."""
        self.tasks.append(asyncio.create_task(self._stay(client)))
        return self.tasks[-1]

    async def _stay(self, client: str) -> None:
        async with self.turns.of(client):
            me = client, asyncio.Event()
            self.inside.append(me)
            self.came.append(client)
            try:
                await me[1].wait()
            finally:
                self.inside.remove(me)

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def let_out(self) -> None:
        """The one who came first leaves."""
        self.inside[0][1].set()
        await self.settle()


async def test_clients_take_turns() -> None:
    """Two work and twenty-four wait of one client: others who come later are next, in turn."""
    visitors = Visitors(Turns(2))
    for client in ["a"] * 26 + ["b"] * 3 + ["c"]:
        visitors.send(client)
    await visitors.settle()
    while visitors.inside:
        await visitors.let_out()

    assert visitors.came[:9] == list("aabacbaba")
    assert visitors.came[9:] == ["a"] * 21


async def test_no_place_is_lost_or_given_twice() -> None:
    """Whoever asks, leaves or gives up, in any order: at most two are in, as many as can be."""
    chance = random.Random(5)
    visitors = Visitors(Turns(2))
    for _ in range(1500):
        match chance.randrange(4):
            case 0 | 1 if len(visitors.tasks) < 40:
                visitors.send(chance.choice("abcd"))
            case 2 if visitors.inside:
                chance.choice(visitors.inside)[1].set()
            case _ if visitors.tasks:
                chance.choice(visitors.tasks).cancel()
        for _ in range(chance.randrange(5)):
            await asyncio.sleep(0)
        if chance.random() < 0.5:
            await visitors.settle()
            visitors.tasks = [task for task in visitors.tasks if not task.done()]
            assert len(visitors.inside) == min(2, len(visitors.tasks))
        assert len(visitors.inside) <= 2
    for task in visitors.tasks:
        task.cancel()
    await visitors.settle()

    assert repr(visitors.turns) == "<Turns 2 free, 0 of 0 clients waiting>"
    assert len(visitors.came) > 300
