"""The worker's loop, run in a thread: it answers every job, whatever happens."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import replace

import pytest

from app.domain import LoadProgress, ModelInfo, Stage
from app.errors import Kind
from app.worker import child
from app.worker.messages import (
    Cancel,
    Done,
    Failed,
    Generate,
    Ping,
    Pong,
    StartFailed,
    Stepped,
    Stop,
)
from app.worker.transport import pair
from tests.support.scripted_engine import MakeScriptedEngine, Script, draw
from tests.worker.conftest import CONFIG, SPEC


class Worker:
    """The child's loop in a thread, and the parent's end of its pipe."""

    def __init__(self, *script: str) -> None:
        self.pipe, theirs = pair(multiprocessing.get_context())
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(theirs, script))
        self._thread.start()

    def _run(self, theirs, script) -> None:
        self.code = child.run(theirs, MakeScriptedEngine(Script.parse(list(script))), CONFIG)

    def hear(self, kind):
        """The next message of *kind*; everything before it is passed over."""
        while not isinstance(message := self.pipe.recv(), kind):
            pass
        return message

    def end(self) -> int | None:
        self.pipe.send(Stop())
        self._thread.join(10)
        self.pipe.close()
        return self.code


@pytest.fixture
def work():
    workers = []

    def start(*script: str) -> Worker:
        workers.append(Worker(*script))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.code is None:
            worker.end()
        worker.pipe.close()


def test_it_says_how_far_it_is_and_that_it_is_ready(work) -> None:
    """Loading comes first, then what is served."""
    worker = work()

    assert isinstance(worker.pipe.recv(), LoadProgress)
    assert worker.hear(ModelInfo).model == "shapes"
    assert worker.end() == 0


def test_the_card_is_free_before_the_pixels_arrive(work) -> None:
    """Steps, then CARD_FREE, then the picture, so that the next job can be sent meanwhile."""
    worker = work()
    worker.pipe.send(Generate("j", SPEC))
    worker.hear(ModelInfo)
    heard = [worker.pipe.recv() for _ in range(6)]

    assert [message.progress.stage for message in heard[:5]] == [Stage.DENOISE] * 4 + [
        Stage.GPU_FREE
    ]
    assert heard[5].generated.image == draw(SPEC)


def test_a_ping_is_answered_by_the_thread_that_makes_pictures(work) -> None:
    """After the job that came before it: an answer says that this thread is not stuck."""
    worker = work()
    worker.pipe.send(Generate("j", SPEC))
    worker.pipe.send(Ping())
    worker.hear(Done)

    assert worker.pipe.recv() == Pong()


def test_an_error_is_answered_and_the_next_job_runs(work) -> None:
    """Out of memory fails one job; the worker lives."""
    worker = work("oom@1")
    worker.pipe.send(Generate("a", SPEC))
    worker.pipe.send(Generate("b", SPEC))

    assert worker.hear(Failed).kind is Kind.OUT_OF_MEMORY
    assert worker.hear(Done).job_id == "b"


def test_after_a_lost_card_it_leaves(work) -> None:
    """The job is answered as fatal and the loop ends with the worker's own exit code."""
    worker = work("sticky@1")
    worker.pipe.send(Generate("a", SPEC))

    assert worker.hear(Failed).kind is Kind.FATAL
    worker._thread.join(10)
    assert worker.code == child.EXIT_FATAL


def test_a_cancelled_job_stops_between_steps(work) -> None:
    """Cancelled during its first steps, it never reaches the last."""
    worker = work("slow=2")
    worker.pipe.send(Generate("a", replace(SPEC, num_inference_steps=20)))
    first = worker.hear(Stepped)
    worker.pipe.send(Cancel("a"))
    failed = worker.hear(Failed)

    assert first.progress.step == 1
    assert failed.kind is Kind.CANCELLED


def test_a_job_cancelled_before_its_turn_is_answered_too(work) -> None:
    """Every job that was sent is answered, also one that never started."""
    worker = work("slow=0.1")
    worker.pipe.send(Generate("first", SPEC))
    worker.pipe.send(Generate("a", SPEC))
    worker.pipe.send(Cancel("a"))

    assert worker.hear(Failed).kind is Kind.CANCELLED


def test_a_model_that_cannot_be_loaded_is_said_in_one_sentence(work) -> None:
    """The sentence crosses, the exception does not."""
    worker = work("startfail")

    assert "does not start" in worker.hear(StartFailed).message
    worker._thread.join(10)
    assert worker.code == child.EXIT_START_FAILED


def test_it_ends_when_the_parent_hangs_up(work) -> None:
    """An orphan does not stay on the card."""
    worker = work()
    worker.hear(ModelInfo)
    worker.pipe.close()
    worker._thread.join(10)

    assert worker.code == 0
