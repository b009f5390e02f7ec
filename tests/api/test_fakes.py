"""The fakes keep the promises of what they stand for, or tests on them would prove nothing."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from app.domain import ImageSpec, Progress
from app.errors import InvalidRequest, Kind, OutOfMemory, Unavailable
from app.images import OutputFormat
from app.service.results import Picture, Preview, Queued
from app.service.service import ImageService
from app.service.ticket import Admission, Ticket
from app.telemetry.metrics import Metrics, Scrape
from tests.support.fakes import (
    FakeAdmission,
    FakeMetrics,
    FakeScrape,
    FakeService,
    FakeTicket,
    Script,
)


def spec(**changes) -> ImageSpec:
    values = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 5}
    return ImageSpec(prompt="a", **{**values, **changes})


@pytest.mark.parametrize(
    ("fake", "real", "names"),
    [
        (
            FakeService,
            ImageService,
            ("admit", "submit", "check", "status", "random_seed", "own_tickets", "find_ticket"),
        ),
        (FakeAdmission, Admission, ("reserve", "submit")),
        (FakeTicket, Ticket, ("pictures", "events", "cancel", "on_end", "advance")),
        (FakeMetrics, Metrics, ("request_finished", "request_rejected", "scrape")),
        (FakeScrape, Scrape, ("exposition",)),
    ],
)
def test_a_fake_has_the_parameters_of_what_it_stands_for(fake, real, names):
    """Whatever is called on a fake could be called on the real thing."""
    for name in names:
        expected = list(inspect.signature(getattr(real, name)).parameters)

        assert expected == list(inspect.signature(getattr(fake, name)).parameters)


async def test_pictures_come_in_the_order_of_the_specs():
    """Each picture has its spec's seed."""
    ticket = FakeService().submit(
        [spec(seed=3), spec(seed=4)], client="a", output=OutputFormat("png")
    )

    assert [picture.seed for picture in await ticket.pictures()] == [3, 4]
    assert ticket.has_ended
    assert not ticket.was_cancelled


async def test_a_cancelled_wait_cancels_the_ticket():
    """Whoever stops waiting for the pictures stops the jobs."""
    service = FakeService(script=Script(release=asyncio.Event()))
    ticket = service.submit([spec()], client="a", output=OutputFormat("png"))
    waiting = asyncio.ensure_future(ticket.pictures())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert ticket.was_cancelled
    assert service.waiting == 0


async def test_a_full_queue_takes_all_or_none():
    """Two images do not fit into the last place."""
    service = FakeService(capacity=2, script=Script(release=asyncio.Event()))
    service.submit([spec()], client="a", output=OutputFormat("png"))
    with pytest.raises(Unavailable) as caught:
        service.submit([spec(), spec()], client="a", output=OutputFormat("png"))

    assert Kind.QUEUE_FULL is caught.value.kind
    assert len(service.tickets) == 1


async def test_more_than_the_whole_queue_is_the_callers_mistake():
    """Trying again would never help, so it is no `Unavailable`."""
    with pytest.raises(InvalidRequest):
        FakeService(capacity=2).admit(client="a").reserve(3)


async def test_events_tell_the_life_of_one_picture():
    """Queued, then steps and previews, then the picture."""
    service = FakeService()
    ticket = service.submit([spec(previews=1)], client="a", output=OutputFormat("png"))
    events = [event async for _, event in ticket.events()]

    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Picture)
    assert len([event for event in events if isinstance(event, Preview)]) == 1
    assert len([event for event in events if isinstance(event, Progress)]) == 4


async def test_a_scripted_error_comes_after_the_previews():
    """The script says how many previews there are before the end."""
    service = FakeService(script=Script(error=OutOfMemory("No room."), previews_before_error=1))
    ticket = service.submit([spec(previews=2)], client="a", output=OutputFormat("png"))
    events = ticket.events()
    kinds = [type((await anext(events))[1]) for _ in range(4)]
    with pytest.raises(OutOfMemory):
        await anext(events)

    assert kinds == [Queued, Progress, Preview, Progress]


async def test_a_closed_stream_cancels_the_ticket():
    """Closing the iterator is the caller's going."""
    ticket = FakeService().submit([spec()], client="a", output=OutputFormat("png"))
    events = ticket.events()
    await anext(events)
    await events.aclose()

    assert ticket.was_cancelled
