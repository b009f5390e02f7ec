"""Several workers behind one face, without processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from app.domain import Device, LoadProgress, Loss, WorkerStage
from app.worker.pool import Pool
from app.worker.rest import Cause
from tests.support.fakes import INFO


class Scripted:
    """A supervisor that is at what the test says."""

    def __init__(self, device, events) -> None:
        self.device, self.events = device, events
        self.progress = LoadProgress(WorkerStage.STARTING)
        self.is_ready = self.has_started = self.is_closed = False
        self.reason = "It starts."
        self.info = None
        self.pid: int | None = None
        self.restart_count = 0

    def start(self) -> None:
        """Have a process."""
        self.has_started, self.pid = True, 100 + (self.device.index or 0)

    def sleep(self) -> None:
        """Have no process."""
        self.is_ready, self.pid = False, None
        self.events.on_asleep()

    def wake(self) -> None:
        """Find something amiss."""
        self.events.on_wake_failed("no files")

    def become_ready(self, *, max_pixels: tuple[int, ...] = ()) -> None:
        """Have loaded."""
        self.progress, self.is_ready, self.reason = LoadProgress(WorkerStage.READY, 1.0), True, ""
        self.info = replace(INFO, max_pixels=max_pixels)
        self.events.on_worker_ready(self.info, 1.0)

    def fail(self, message: str) -> None:
        """Be given up."""
        self.progress, self.is_ready = LoadProgress(WorkerStage.FAILED, None, message), False
        self.pid, self.reason = None, "It failed."
        self.events.on_fatal(70, message)

    async def close(self) -> None:
        """Be closed."""
        await asyncio.sleep(0)
        self.is_closed = True

    def kill(self) -> None:
        """Be killed."""
        self.pid = None


class Listening:
    """Notes what the pool says."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def on_worker_ready(self, worker, info, seconds) -> None:
        """A worker is ready."""
        self.heard.append(("ready", worker.device.index))

    def on_worker_lost(self, worker, reason) -> None:
        """One was lost."""
        self.heard.append(("lost", worker.device.index, reason))

    def on_asleep(self, worker) -> None:
        """One sleeps."""

    def on_left_out(self, worker) -> None:
        """One is left out."""
        self.heard.append(("left out", worker.device.index))

    def on_fatal(self, exit_code, message) -> None:
        """The last one was given up."""
        self.heard.append(("fatal", exit_code, message))


def pool_of(count: int, *, at_once: int | None = None) -> tuple[Pool, list[Scripted], Listening]:
    """A started pool, its supervisors, and what is heard of them."""
    listening = Listening()
    devices = [Device(index, "RTX", f"GPU-{index}") for index in range(count)]
    pool = Pool(Scripted, devices, listening, at_once=at_once)
    pool.start()
    return pool, [each.supervisor for each in pool.workers], listening


def test_it_is_ready_while_one_is() -> None:
    """One of three is enough, whichever."""
    pool, (_, second, third), _ = pool_of(3)
    assert (pool.is_ready, pool.reason) == (False, "It starts.")
    second.become_ready()
    assert (pool.is_ready, pool.reason, pool.progress.stage) == (True, "", WorkerStage.READY)
    third.become_ready()
    second.is_ready = False
    assert pool.is_ready
    third.is_ready = False
    assert not pool.is_ready
    assert [each.is_ready for each in pool.statuses] == [False, False, False]


def test_of_those_that_load_the_furthest_is_shown() -> None:
    """A start's progress is that of the worker that will be ready first."""
    pool, (first, second, _), _ = pool_of(3)
    first.progress = LoadProgress(WorkerStage.WEIGHTS, 0.4)
    second.progress = LoadProgress(WorkerStage.WEIGHTS, 0.7)

    assert pool.progress is second.progress


def test_the_largest_size_is_that_of_any_card() -> None:
    """A small card does not limit what the large one may be asked for."""
    pool, (first, second), _ = pool_of(2)
    first.become_ready(max_pixels=(1_000, 0))
    second.become_ready(max_pixels=(4_000, 2_000))

    assert pool.info.max_pixels == (4_000, 2_000)


def test_one_that_is_given_up_is_left_out_and_the_last_ends_the_service() -> None:
    """The others go on, and count no more is said of it; the end has the last one's words."""
    pool, (first, second), listening = pool_of(2)
    first.become_ready()
    second.fail("The card fell off the bus.")
    assert pool.is_ready
    assert [each.is_left_out for each in pool.statuses] == [False, True]
    first.fail("And this one.")

    assert listening.heard == [("ready", 0), ("left out", 1), ("fatal", 70, "And this one.")]
    assert (pool.is_ready, pool.reason) == (False, "It failed.")
    assert pool.progress.stage == WorkerStage.FAILED


def test_a_loss_is_told_with_its_card() -> None:
    """So that it is counted for the card."""
    _, (_, second), listening = pool_of(2)
    second.events.on_worker_lost(Loss.HANG)

    assert listening.heard == [("lost", 1, Loss.HANG)]


@pytest.mark.parametrize("ends", ["become_ready", "fail"])
def test_where_memory_holds_one_load_they_load_one_after_the_other(ends) -> None:
    """The next starts when the one before is ready, or is left out."""
    _, (first, second, third), _ = pool_of(3, at_once=1)
    assert [each.has_started for each in (first, second, third)] == [True, False, False]
    getattr(first, ends)(*(["no"] if ends == "fail" else []))
    assert [each.has_started for each in (second, third)] == [True, False]
    second.become_ready()
    first.become_ready()
    assert third.has_started


async def test_closed_together_and_none_starts_after() -> None:
    """Also those that were not started yet."""
    pool, (first, second), _ = pool_of(2, at_once=1)
    await pool.close()
    first.become_ready()

    assert first.is_closed
    assert second.is_closed
    assert not second.has_started


def test_where_cards_differ_the_others_wait_for_the_first_to_choose() -> None:
    """The oldest card loads alone, and the rest together after it; given up, the next is alone."""
    listening = Listening()
    devices = [Device(index, f"RTX {index}", f"GPU-{index}") for index in range(4)]
    pool = Pool(Scripted, devices, listening, first=devices[2])
    pool.start()
    workers = [each.supervisor for each in pool.workers]
    assert [each.has_started for each in workers] == [False, False, True, False]
    workers[2].fail("no")
    assert [each.has_started for each in workers] == [True, False, True, False]
    workers[0].become_ready()
    assert all(each.has_started for each in workers)


def test_a_start_counts_those_that_load_again() -> None:
    """With room for one load, no other starts while a worker that died is loading."""
    listening = Listening()
    devices = [Device(index, "RTX", f"GPU-{index}") for index in range(3)]
    pool = Pool(Scripted, devices, listening, at_once=1)
    pool.start()
    first, second, third = (each.supervisor for each in pool.workers)
    first.become_ready()
    assert second.has_started
    first.progress = LoadProgress(WorkerStage.WEIGHTS)
    second.become_ready()
    assert not third.has_started
    first.become_ready()
    assert third.has_started


def test_a_wake_that_fails_is_tried_again_less_and_less(monkeypatch) -> None:
    """In one row, however often a wake is asked for meanwhile; and anew after one that succeeds."""
    left: list[tuple[float, Callable[[], None]]] = []

    def call_later(delay_s: float, act: Callable[[], None]) -> SimpleNamespace:
        left[:] = [*left, (delay_s, act)]
        return SimpleNamespace(cancel=left.clear)

    loop = SimpleNamespace(call_later=call_later)
    monkeypatch.setattr("app.worker.pool.asyncio.get_running_loop", lambda: loop)
    pool, (worker,), _ = pool_of(1)
    worker.become_ready()
    pool.sleep(Cause.ASKED)
    pool.wake(Cause.ASKED)
    waited = []
    for _ in range(5):
        ((delay_s, act),) = tuple(left)
        waited.append(delay_s)
        act()
    assert waited == [15, 30, 60, 120, 120]
    pool.wake(Cause.ASKED)
    assert len(left) == 1
    assert pool.reason == "no files"
    worker.become_ready()
    pool.sleep(Cause.ASKED)
    pool.wake(Cause.ASKED)
    assert [delay_s for delay_s, _ in left] == [15]
