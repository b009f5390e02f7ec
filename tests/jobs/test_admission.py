"""A request from its arrival to its jobs: what it holds meanwhile, and until when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from app.domain import ImageSpec
from app.errors import Cancelled, DeadlineExceeded, InvalidRequest, Kind, KleinError, Unavailable
from app.images import OutputFormat
from tests.support.in_process import InProcess

PNG = OutputFormat("png")
SPEC = ImageSpec("x", 1024, 1024, 4, 1.0, 0)
TINY = ImageSpec("x", 64, 64, 4, 1.0, 0)


class Clock:
    """Stands until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def at(clock: Clock) -> AsyncIterator[InProcess]:
    """A service with four places and four images a minute; nothing takes its jobs."""
    runtime = InProcess(capacity=4, per_minute=4, clock=clock)
    yield runtime
    await runtime.close()


async def test_the_deadline_counts_from_the_arrival(at, clock) -> None:
    """A hundred seconds for the body leave twenty of two minutes."""
    with at.service.admit(client="a") as admission:
        clock.now += 100
        admission.reserve(1)
        clock.now += 1
        admission.submit([TINY], PNG)

    (job,) = at.queue._waiting
    assert job.deadline == 1120.0


async def test_a_clients_own_deadline_counts_from_the_arrival_too(at, clock) -> None:
    """Five seconds, of which three are over when its pictures are decoded."""
    with at.service.admit(client="a", deadline_s=5.0) as admission:
        clock.now += 3
        admission.reserve(1)
        assert admission.seconds_left == 2.0
        admission.submit([TINY], PNG)

    (job,) = at.queue._waiting
    assert job.deadline == 1005.0


async def test_what_arrives_too_slowly_gets_no_place(at, clock) -> None:
    """Its deadline has come before its body was read: it is told, and holds nothing."""
    with at.service.admit(client="a", deadline_s=5.0) as admission:
        clock.now += 6
        with pytest.raises(DeadlineExceeded):
            admission.reserve(1)
        with pytest.raises(DeadlineExceeded):
            admission.submit([TINY], PNG)
        assert at.queue.size == 0


async def test_what_is_decoded_too_slowly_gets_no_picture(at, clock) -> None:
    """Its deadline has come since its place was taken: it is told, and the place is free."""
    with at.service.admit(client="a", deadline_s=5.0) as admission:
        admission.reserve(1)
        clock.now += 6
        with pytest.raises(DeadlineExceeded):
            admission.submit([TINY], PNG)

    assert at.queue.size == 0


async def test_a_place_is_held_while_pictures_are_decoded(at) -> None:
    """Four places of four, and no picture yet: the next is turned away; when they have left it is
    not."""
    with at.service.admit(client="a") as admission:
        admission.reserve(4)
        with pytest.raises(Unavailable) as refused:
            at.service.admit(client="b")
        assert refused.value.kind is Kind.QUEUE_FULL
        assert at.service.status().queue_size == 4

    assert at.service.status().queue_size == 0
    at.service.submit([TINY], client="b", output=PNG)


async def test_invalid_pictures_cost_the_rate_but_no_place(at) -> None:
    """Of four images a minute, three whose pictures turn out to be none: one is left."""

    def send_no_picture() -> None:
        with at.service.admit(client="a") as admission:
            admission.reserve(1)
            raise InvalidRequest("This is no picture.")

    for _ in range(3):
        with pytest.raises(InvalidRequest):
            send_no_picture()
    at.service.submit([TINY], client="a", output=PNG)

    assert at.queue.size == 1
    with pytest.raises(KleinError) as refused:
        at.service.admit(client="a")
    assert refused.value.kind is Kind.RATE_LIMITED


async def test_a_reserved_image_counts_once(at) -> None:
    """Four that were reserved and then submitted take four tokens and four places."""
    with at.service.admit(client="a") as admission:
        admission.reserve(4)
        ticket = admission.submit([TINY] * 4, PNG)

    assert at.queue.size == 4
    ticket.cancel()
    assert at.queue.size == 0
    assert repr(at.queue) == "<JobQueue 0 of 4 waiting, 0 running>"


async def test_a_spec_beyond_the_limits_frees_the_places(at) -> None:
    """Known only once its pictures are decoded."""
    too_large = ImageSpec("x", 4096, 4096, 4, 1.0, 0)
    with at.service.admit(client="a") as admission:
        admission.reserve(2)
        with pytest.raises(InvalidRequest):
            admission.submit([TINY, too_large], PNG)

    assert at.queue.size == 0


async def test_what_has_its_place_is_finished_though_the_service_drains(clock) -> None:
    """Told to stop while pictures are decoded, it waits for the picture that was accepted; who
    had only arrived is turned away."""
    runtime = InProcess(clock=clock)
    await runtime.start()
    service = runtime.service
    with service.admit(client="a") as admission, service.admit(client="b") as other:
        admission.reserve(1)
        assert service.drain() == 120.0
        idle = asyncio.ensure_future(runtime.queue.wait_until_empty())
        await asyncio.sleep(0)
        assert not idle.done()
        with pytest.raises(Unavailable) as refused:
            other.reserve(1)
        ticket = admission.submit([TINY], PNG)

    assert refused.value.kind is Kind.DRAINING
    assert len(await ticket.pictures()) == 1
    await idle
    await runtime.close()


async def test_what_has_its_place_is_told_when_the_service_ends(at) -> None:
    """The same error as those that wait get, instead of a wait for nobody."""
    with at.service.admit(client="a") as admission:
        admission.reserve(1)
        at.queue.fail_waiting(Cancelled())
        with pytest.raises(Cancelled):
            admission.submit([TINY], PNG)

    assert at.queue.size == 0


async def test_after_many_tiny_pictures_none_is_turned_away_for_its_deadline() -> None:
    """Twenty of 64x64 at a tenth of a second, and thirty-two of 0.6 s fit into a queue of so many:
    each is expected to be ready long before its deadline."""
    runtime = InProcess(capacity=32)
    runtime.estimator.learn(SPEC, 0.6)
    for _ in range(20):
        runtime.estimator.learn(TINY, 0.1)
    for _ in range(32):
        runtime.service.submit([SPEC], client="a", output=PNG)

    assert runtime.queue.size == 32
    assert runtime.queue.expected_wait_s() == pytest.approx(32 * 0.6, rel=0.1)
    await runtime.close()


async def test_no_other_work_makes_an_answer_wait() -> None:
    """With every thread of the default executor busy, a picture is encoded and its answer
    built."""
    from app.api.app import create_app
    from app.settings import Settings
    from tests.api.conftest import client_of

    runtime, release = InProcess(), threading.Event()
    loop = asyncio.get_running_loop()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    app = create_app(Settings.read({}), lambda _: runtime)
    asked = {"prompt": "x", "size": "256x256"}
    try:
        async with client_of(app) as client, asyncio.timeout(5):
            plain = await client.post("/v1/images/generations", json=asked)
            stream = await client.post("/v1/images/generations", json=asked | {"stream": True})
    finally:
        release.set()
        await asyncio.gather(*busy)

    assert plain.status_code == 200
    assert b"image_generation.completed" in stream.content


@pytest.mark.parametrize("reserves", [False, True])
async def test_who_fills_the_time_that_is_allowed_keeps_nobody_out(reserves) -> None:
    """Pictures of 5 s, each ready within 30 s of being asked for: so many fit that places are
    never short. One client asks again whenever there is time for one more, another right after
    it; of any three turns of the card, the other is accepted in one at least, also where both take
    their place first, as for an edit."""
    clock = Clock()
    runtime = InProcess(capacity=32, deadline_s=10.0, clock=clock)
    runtime.estimator.learn(SPEC, 5.0)

    def ask(client: str) -> bool:
        try:
            with runtime.service.admit(client=client) as admission:
                if reserves:
                    admission.reserve(1)
                admission.submit([SPEC], PNG)
        except Unavailable:
            return False
        return True

    accepted = []
    for _ in range(12):
        while ask("greedy"):
            pass
        accepted.append(ask("polite"))
        job = await runtime.queue.take()
        clock.now += 5
        job.future.cancel()
        runtime.queue.finish(job)

    assert runtime.queue.capacity > 2 * runtime.queue.size
    assert all(any(accepted[i : i + 3]) for i in range(10)), accepted
    await runtime.close()


async def test_a_large_body_has_its_place_and_token_from_its_arrival(at) -> None:
    """Of four places and four images a minute, three are taken by bodies that are still being
    read; what comes to nothing gives the place back but no token."""
    with at.service.admit(client="a", is_large=True), at.service.admit(client="a", is_large=True):
        assert at.queue.size == 2
        with at.service.admit(client="a", is_large=True) as admission:
            with pytest.raises(KleinError) as refused:
                admission.reserve(3)
            assert refused.value.kind is Kind.RATE_LIMITED
    assert at.queue.size == 0
    at.service.submit([TINY], client="a", output=PNG)

    with pytest.raises(KleinError) as refused:
        at.service.admit(client="a")
    assert refused.value.kind is Kind.RATE_LIMITED


@pytest.mark.parametrize("reserves", [False, True])
async def test_a_large_body_takes_further_places_once_their_number_is_known(at, reserves) -> None:
    """Three images take three places and tokens, whether they were asked for before or not."""
    with at.service.admit(client="a", is_large=True) as admission:
        assert at.queue.size == 1
        if reserves:
            admission.reserve(3)
            assert at.queue.size == 3
        ticket = admission.submit([TINY] * 3, PNG)

    assert repr(at.queue) == "<JobQueue 3 of 4 waiting, 0 running>"
    ticket.cancel()
    at.service.submit([TINY], client="a", output=PNG)
    with pytest.raises(KleinError) as refused:
        at.service.admit(client="a")
    assert refused.value.kind is Kind.RATE_LIMITED


async def test_a_large_body_that_is_still_read_holds_up_no_end(at) -> None:
    """Told to stop, the service waits for nobody who has only arrived, and turns it away once its
    body is there; what was reserved after the body it waits for."""
    service = at.service
    with (
        service.admit(client="a", is_large=True) as admission,
        service.admit(client="a", is_large=True) as other,
    ):
        other.reserve(1)
        assert service.drain() == pytest.approx(120.0)
        idle = asyncio.ensure_future(at.queue.wait_until_empty())
        await asyncio.sleep(0)
        assert not idle.done()
        ticket = other.submit([TINY], PNG)
        ticket.cancel()
        async with asyncio.timeout(30):
            await idle
        for take in (lambda: admission.reserve(1), lambda: admission.submit([TINY], PNG)):
            with pytest.raises(Unavailable) as refused:
                take()
            assert refused.value.kind is Kind.DRAINING

    assert at.queue.size == 0


async def test_where_further_places_are_missing_none_is_kept(at) -> None:
    """All or none, and the first is free again."""
    at.service.submit([TINY] * 2, client="b", output=PNG)
    with at.service.admit(client="a", is_large=True) as admission:
        with pytest.raises(Unavailable):
            admission.submit([TINY] * 3, PNG)
        with pytest.raises(InvalidRequest, match="at most 4 images may wait"):
            InProcess(capacity=4).service.admit(client="a", is_large=True).reserve(5)

    assert at.queue.size == 2


async def test_a_deadline_of_the_clients_own_keeps_nothing_for_it() -> None:
    """Or who allows too little time would keep it from those who allow enough."""
    clock = Clock()
    runtime = InProcess(capacity=32, deadline_s=10.0, clock=clock)
    runtime.estimator.learn(SPEC, 5.0)
    for _ in range(5):
        runtime.service.submit([SPEC], client="a", output=PNG)
    hasty = runtime.service.admit(client="hasty", deadline_s=6.0)
    with pytest.raises(Unavailable, match="would miss its deadline"):
        hasty.submit([SPEC], PNG)
    runtime.service.submit([SPEC], client="a", output=PNG)

    assert runtime.queue.size == 6
    await runtime.close()
