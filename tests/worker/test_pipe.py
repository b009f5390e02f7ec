"""What one process sends is what the other receives, pixels included, whichever way they take."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from app.domain import Generated, ImageSpec, RawImage, StageTimings
from app.worker.messages import Done, Generate
from app.worker.transport import pair


def done(job_id: str, width: int, height: int) -> Done:
    """A picture whose bytes differ from one job to the next."""
    pixels = (job_id.encode() * (3 * width * height))[: 3 * width * height]
    timings = StageTimings(0.0, 0.0, 0.0, 0.0, ())
    return Done(job_id, Generated(RawImage(width, height, pixels), timings, None, 1, False, None))


@pytest.fixture
def ends():
    ours, theirs = pair(multiprocessing.get_context())
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (64, 192), (2048, 2048), (2560, 2560)])
def test_a_picture_arrives_as_it_was_sent(ends, width, height) -> None:
    """Small, large, and larger than the memory that both processes see."""
    ours, theirs = ends
    sent = done("a", width, height)
    thread = threading.Thread(target=theirs.send, args=(sent,))
    thread.start()

    assert ours.recv() == sent
    thread.join()


def test_a_picture_waits_until_the_one_before_it_was_received(ends) -> None:
    """The second does not overwrite what nobody has read yet."""
    ours, theirs = ends
    pictures = [done("a", 64, 64), done("b", 64, 64), done("c", 64, 64)]

    def send_all() -> None:
        for picture in pictures:
            theirs.send(picture)

    thread = threading.Thread(target=send_all)
    thread.start()
    thread.join(0.2)

    assert thread.is_alive()
    assert [ours.recv() for _ in pictures] == pictures
    thread.join()


def test_everything_else_goes_through_the_pipe_both_ways(ends) -> None:
    """Words come in order, whatever else is under way."""
    ours, theirs = ends
    jobs = [Generate(str(n), ImageSpec("a", 64, 64, 4, 1.0, n)) for n in range(3)]
    for job in jobs:
        ours.send(job)

    assert [theirs.recv() for _ in jobs] == jobs
