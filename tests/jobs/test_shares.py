"""Who gets the places that come free: nobody all of them, and who was turned away the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.errors import Unavailable
from app.jobs.job import Job, JobState
from app.jobs.queue import JobQueue
from tests.jobs.conftest import SPEC, generated

TICK_S = 0.02
PICTURE_S = 0.16
POLITE_S = 0.4


class Scene:
    """A queue and a card on a clock of its own: one picture after another, each of 160 ms."""

    def __init__(self, capacity: int) -> None:
        self.now = 1000.0
        self.queue = JobQueue(capacity, clock=lambda: self.now)
        self.turns: list[str] = []
        """Whose picture was made, one after another."""
        self._taking: asyncio.Task[Job] | None = None
        self._running: Job | None = None
        self._done_at = 0.0
        self.live: list[Job] = []
        """What was accepted and has not ended. It is made: none may fail."""

    def ask(self, client: str, images: int = 1) -> bool:
        """Ask for pictures; whether they were accepted."""
        loop = asyncio.get_running_loop()
        jobs = [
            Job(client, SPEC, client, self.now + 1e6, loop.create_future(), predicted_s=PICTURE_S)
            for _ in range(images)
        ]
        try:
            self.queue.submit(jobs, retry_after_s=1)
        except Unavailable:
            return False
        self.live += jobs
        return True

    def held(self, client: str) -> int:
        """How many places *client* holds."""
        return sum(job.client == client and job.state is JobState.WAITING for job in self.live)

    async def pass_time(self, seconds: float, each_tick: Callable[[], None]) -> None:
        """Let the card work on, and call *each_tick* fifty times a second."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            if self._running is not None and self.now >= self._done_at:
                self._running.succeed(generated(SPEC))
                self.queue.finish(self._running)
                self._running = None
            if self._running is None and self._taking is None:
                self._taking = asyncio.create_task(self.queue.take())
                await asyncio.sleep(0)
            each_tick()
            await asyncio.sleep(0)
            if self._taking is not None and self._taking.done():
                self._running, self._taking = self._taking.result(), None
                self._done_at = self.now + PICTURE_S
                self.turns.append(self._running.client)
            assert all(job.future.exception() is None for job in self.live if job.future.done())
            self.live = [job for job in self.live if not job.future.done()]

    async def close(self) -> None:
        """Stop the card."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])


def hog(scene: Scene, client: str = "hog", sockets: int = 24) -> Callable[[], None]:
    """Twenty-four sockets of one client, each of which asks again at once."""

    def ask() -> None:
        asking = sockets - sum(job.client == client for job in scene.live)
        while asking > 0 and scene.ask(client):
            asking -= 1

    return ask


def polite(scene: Scene, client: str = "polite") -> Callable[[], list[bool]]:
    """One who asks every 0.4 s, whatever came of the last time; what became of each."""
    asked: list[bool] = []
    start = scene.now

    def ask() -> None:
        if scene.now - start >= POLITE_S * (len(asked) + 1):
            asked.append(scene.ask(client))

    ask.asked = asked  # type: ignore[attr-defined]
    return ask


def together(*askers: Callable[[], object]) -> Callable[[], None]:
    """All of them, the first first."""

    def ask() -> None:
        for asker in askers:
            asker()

    return ask


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 8, 16])
async def test_who_asks_politely_is_served_beside_who_never_stops_asking(capacity) -> None:
    """One key on 24 sockets fills the queue; another asks forty times, every 0.4 s. Of any three
    times in a row it is accepted at least once, and of all, with four places or more, each time
    but the first; everything that was accepted is made."""
    scene = Scene(capacity)
    greedy = hog(scene)
    await scene.pass_time(3.0, greedy)
    modest = polite(scene)
    await scene.pass_time(40 * POLITE_S + TICK_S, together(greedy, modest))

    asked = modest.asked
    assert len(asked) == 40
    assert all(any(asked[i : i + 3]) for i in range(38)), asked
    if capacity >= 4:
        assert all(asked[1:])
        first = scene.turns.index("polite")
        later = scene.turns[first:]
        assert all("polite" in later[i : i + 3] for i in range(len(later) - 3))
    await scene.close()


@pytest.mark.parametrize("hogs", [2, 3])
async def test_several_who_never_stop_asking_do_not_keep_out_one_who_asks_politely(hogs) -> None:
    """Together they could fill the queue, each within its share; the polite one still gets every
    third of its wishes."""
    scene = Scene(8)
    greedy = [hog(scene, f"hog {number}") for number in range(hogs)]
    await scene.pass_time(3.0, together(*greedy))
    modest = polite(scene)
    await scene.pass_time(40 * POLITE_S + TICK_S, together(*greedy, modest))

    assert all(any(modest.asked[i : i + 3]) for i in range(38)), modest.asked
    await scene.close()


async def test_a_client_alone_may_fill_the_queue() -> None:
    """All eight places, until another has asked; then six, once what it has is made."""
    scene = Scene(8)
    greedy = hog(scene)
    await scene.pass_time(1.0, greedy)
    assert scene.held("hog") == 8

    scene.ask("other")
    await scene.pass_time(4 * PICTURE_S, greedy)
    assert scene.held("hog") == 6
    await scene.close()


async def test_a_client_is_alone_again_when_nobody_else_has_asked_for_half_a_minute() -> None:
    """And it may fill the queue as before."""
    scene = Scene(8)
    scene.ask("other")
    await scene.pass_time(29.0, lambda: None)
    for _ in range(8):
        scene.ask("hog")
    assert scene.held("hog") == 6

    await scene.pass_time(2.0, hog(scene))
    assert scene.held("hog") == 8
    await scene.close()


async def test_who_needs_several_places_gets_them_too() -> None:
    """Four at once, of eight, beside one who takes every place that comes free."""
    scene = Scene(8)
    greedy = hog(scene)
    await scene.pass_time(1.0, greedy)
    assert not scene.ask("other", images=4)
    await scene.pass_time(1.0, greedy)
    assert scene.ask("other", images=4)
    await scene.close()


async def test_places_kept_for_who_does_not_come_back_are_given_to_others_in_time() -> None:
    """Turned away and told to come back in a second, it has half a minute more; then the queue is
    full again."""
    scene = Scene(4)
    one, two = hog(scene, "one"), hog(scene, "two")
    await scene.pass_time(1.0, together(one, two))
    assert scene.held("one") + scene.held("two") == 4
    assert not scene.ask("gone")
    await scene.pass_time(1.0, together(one, two))
    assert scene.held("one") + scene.held("two") == 3
    await scene.pass_time(31.0, together(one, two))
    assert scene.held("one") + scene.held("two") == 4
    await scene.close()


async def test_the_card_is_never_idle_for_who_may_not_come_back() -> None:
    """With one place kept and the card free, whoever asks is served within a tick."""
    scene = Scene(1)
    await scene.pass_time(TICK_S, hog(scene, "one"))
    assert not scene.ask("gone")
    turns = len(scene.turns)
    await scene.pass_time(20 * PICTURE_S, hog(scene, "one"))

    assert len(scene.turns) - turns >= int(20 * PICTURE_S / (PICTURE_S + TICK_S))
    await scene.close()


async def test_a_place_kept_for_somebody_is_no_place_of_an_idle_card() -> None:
    """With every place reserved by requests that are still read, one kept, and nothing on the
    card, whoever asks is served."""
    scene = Scene(4)
    scene.queue.reserve("one", 3, retry_after_s=1)
    scene.queue.reserve("two", 1, retry_after_s=1)
    assert not scene.ask("gone")
    taking = asyncio.ensure_future(scene.queue.take())
    await asyncio.sleep(0)

    assert scene.ask("other")
    assert (await taking).client == "other"
    await scene.close()


def has_time(scene: Scene, client: str, work_s: float, left_s: float) -> bool:
    """Whether so much work would be accepted; where not, it has a claim."""
    try:
        scene.queue.check_time(client, [work_s], left_s, retry_after_s=1, has_claim=True)
    except Unavailable:
        return False
    return True


async def test_of_the_time_that_another_has_at_most_a_quarter_is_kept() -> None:
    """However much work somebody was turned away with."""
    scene = Scene(8)
    scene.ask("a", images=5)  # 0.8 s
    assert not has_time(scene, "gone", 100.0, 100.5)

    assert has_time(scene, "b", 1.0, 5.0)  # 0.8, 1 kept, 1
    assert not has_time(scene, "c", 4.0, 5.0)  # 0.8, 0.25 kept, 4
    await scene.close()


async def test_no_time_of_an_idle_card_is_kept() -> None:
    """Whoever asks gets it."""
    scene = Scene(8)
    scene.ask("a")
    assert not has_time(scene, "gone", 100.0, 100.1)
    scene.queue.finish(await scene.queue.take())

    assert has_time(scene, "b", 5.0, 5.0)
    assert has_time(scene, "b", 1.0, 5.0)
    await scene.close()


async def test_nothing_is_kept_for_a_client_whose_callers_have_gone() -> None:
    """Who was turned away for the work of its own that was before, and then has hung up."""
    scene = Scene(8)
    scene.ask("a", images=2)
    assert not has_time(scene, "a", 10.0, 10.1)
    first, second = scene.live
    scene.queue.cancel(first)
    assert "1 claims" in repr(scene.queue._shares)

    scene.queue.cancel(second)
    assert "0 claims" in repr(scene.queue._shares)
    for job in scene.live:
        job.future.exception()
    await scene.close()


async def test_a_turn_is_kept_until_the_jobs_come() -> None:
    """Who has its place and is then turned away for want of time is still the first of those who
    were turned away, and its place counts once."""
    scene = Scene(8)
    scene.ask("a", images=6)
    scene.ask("b", images=2)
    for client in ("first", "second"):
        assert not scene.ask(client)
    scene.queue.cancel(scene.live[0])
    places = scene.queue.reserve("first", 1, retry_after_s=1)
    assert not has_time(scene, "second", 4.0, 5.0)
    assert not has_time(scene, "first", 4.0, 5.0)
    scene.queue.give_back(places)

    shares = scene.queue._shares
    assert (shares.kept_s("first", 100.0), shares.kept_s("second", 100.0)) == (0.0, 4.0)
    assert shares.kept("second") == 0
    for job in scene.live:
        scene.queue.cancel(job)
        job.future.exception()
    await scene.close()


async def test_a_refused_share_says_what_to_do() -> None:
    """The sentence has the share, the queue's size and when to come again."""
    scene = Scene(8)
    scene.ask("other")
    for _ in range(6):
        assert scene.ask("hog")
    with pytest.raises(Unavailable) as refused:
        scene.queue.reserve("hog", 1, retry_after_s=7)

    assert refused.value.retry_after_s == 7
    assert "one client may hold 6 of the queue's 8 places" in refused.value.message
    assert refused.value.message.endswith("try again in 7 s.")
    await scene.close()
