"""Real processes that exit, hang, lose their card or refuse to start."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from app.domain import LoadProgress, Stage, WorkerStage
from app.errors import GenerationFailed, OutOfMemory, WorkerLost
from app.worker import supervisor as module
from app.worker.supervisor import EXIT_CRASH_LOOP, EXIT_START_FAILED, TimeLimits
from tests.support.scripted_engine import draw
from tests.worker.conftest import SPEC

pytestmark = pytest.mark.slow


def ignore(progress) -> None:
    """Nobody listens."""


async def test_a_picture_comes_back_from_another_process(supervise) -> None:
    """The pixels are those that the spec decides."""
    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        generated = await supervisor.run("a", SPEC, ignore)

        assert generated.image == draw(SPEC)
        assert supervisor.pid != os.getpid()


async def test_a_killed_worker_fails_its_job_and_is_replaced(supervise) -> None:
    """`kill -9` during a job: that job gets an error, the next one a picture."""
    async with supervise("slow=5") as (supervisor, listening):
        await listening.wait_for("ready")
        running = asyncio.ensure_future(supervisor.run("a", SPEC, ignore))
        await asyncio.sleep(0)
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost):
            await running
        await listening.wait_for("ready", 2)

        assert listening.heard == ["ready", "killed", "ready"]
        assert supervisor.restart_count == 1


async def test_a_lost_card_costs_its_job_and_the_worker(supervise, tmp_path) -> None:
    """No second job starts on the dead context; the fresh worker makes the next picture."""
    once = tmp_path / "once"
    async with supervise("sticky@2", f"once={once}") as (supervisor, listening):
        await listening.wait_for("ready")
        await supervisor.run("a", SPEC, ignore)
        with pytest.raises(WorkerLost):
            await supervisor.run("b", SPEC, ignore)
        assert not supervisor.is_ready

        generated = await supervisor.run("c", SPEC, ignore)

        assert generated.image == draw(SPEC)
        assert listening.heard == ["ready", "fatal_cuda", "ready"]


async def test_out_of_memory_keeps_the_worker(supervise) -> None:
    """The job fails alone: same process, no restart."""
    async with supervise("oom@1", "fail@2") as (supervisor, listening):
        await listening.wait_for("ready")
        pid = supervisor.pid
        with pytest.raises(OutOfMemory):
            await supervisor.run("a", SPEC, ignore)
        with pytest.raises(GenerationFailed):
            await supervisor.run("b", SPEC, ignore)
        await supervisor.run("c", SPEC, ignore)

        assert supervisor.pid == pid
        assert listening.heard == ["ready"]


async def test_a_step_that_never_returns_counts_as_a_death(supervise, tmp_path) -> None:
    """The watchdog ends the hung worker, and the next job runs on a new one."""
    once = tmp_path / "once"
    limits = TimeLimits(silence_s=0.5)
    async with supervise("hang@1", f"once={once}", limits=limits) as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(WorkerLost):
            await supervisor.run("a", SPEC, ignore)
        await supervisor.run("b", SPEC, ignore)

        assert listening.heard == ["ready", "hang", "ready"]


async def test_slow_steps_that_were_predicted_are_not_a_hang(supervise) -> None:
    """Twenty predicted steps of silence are allowed where that is longer than the fixed limit."""
    limits = TimeLimits(silence_s=0.05)
    async with supervise("slow=1.2", limits=limits, step_s=0.3) as (supervisor, listening):
        await listening.wait_for("ready")
        await supervisor.run("a", SPEC, ignore)

        assert listening.heard == ["ready"]


async def test_cancelling_stops_within_a_step_and_frees_the_card(supervise, tmp_path) -> None:
    """The call returns when the worker has stopped, and the next job starts at once."""
    trace = tmp_path / "trace"
    async with supervise("slow=2", f"trace={trace}") as (supervisor, listening):
        await listening.wait_for("ready")
        stepped = asyncio.Event()
        spec = replace(SPEC, num_inference_steps=40)
        running = asyncio.ensure_future(supervisor.run("a", spec, lambda p: stepped.set()))
        await stepped.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        (line,) = trace.read_text().splitlines()

        assert line.startswith("stopped ")
        assert int(line.split()[1]) <= 3


async def test_three_deaths_without_a_picture_end_the_service(supervise) -> None:
    """Exit code 70 and one sentence."""
    async with supervise("exit@1") as (supervisor, listening):
        for _ in range(3):
            with pytest.raises(WorkerLost):
                await supervisor.run("a", SPEC, ignore)
        await listening.wait_for("fatal")

        assert listening.fatal is not None
        assert listening.fatal[0] == EXIT_CRASH_LOOP
        assert "three" not in listening.fatal[1]
        assert "3 times in ten minutes" in listening.fatal[1]


async def test_a_model_that_does_not_load_ends_the_service(supervise) -> None:
    """It is not tried again: that would hide the reason."""
    async with supervise("startfail") as (_supervisor, listening):
        await listening.wait_for("fatal")

        assert listening.heard == ["fatal"]
        assert listening.fatal is not None
        assert listening.fatal[0] == EXIT_START_FAILED
        assert "does not start" in listening.fatal[1]


async def test_loading_has_a_limit_of_its_own(supervise) -> None:
    """A worker that never becomes ready is ended and the service says so."""
    async with supervise("load=60", limits=TimeLimits(load_s=0.3)) as (_supervisor, listening):
        await listening.wait_for("fatal")

        assert listening.fatal is not None
        assert listening.fatal[0] == EXIT_START_FAILED


async def test_progress_reaches_the_caller(supervise) -> None:
    """Every step is told, and last that the card is free."""
    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        told = []
        await supervisor.run("a", SPEC, told.append)

        assert [progress.step for progress in told] == [1, 2, 3, 4, 4]
        assert told[-1].stage is Stage.GPU_FREE


async def test_closing_ends_the_process(supervise) -> None:
    """Also one that does not listen."""
    limits = TimeLimits(close_s=0.3)
    async with supervise("hang@1", limits=limits) as (supervisor, listening):
        await listening.wait_for("ready")
        running = asyncio.ensure_future(supervisor.run("a", SPEC, ignore))
        await asyncio.sleep(0)
        pid = supervisor.pid
        await supervisor.close()
        with pytest.raises(WorkerLost):
            await running

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_was_given_up_stays_so(supervise, monkeypatch) -> None:
    """No timer of a start that was not possible brings it back, long after its deaths are old."""

    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(module, "launch", refuse)
    monkeypatch.setattr("app.worker.restarts.BACK_OFF_S", (0.0, 0.01, 0.01, 0.01))
    async with supervise(limits=TimeLimits(load_s=0.3)) as (supervisor, listening):
        await listening.wait_for("fatal")
        supervisor._deaths.clear()
        monkeypatch.undo()
        await asyncio.sleep(0.5)
        supervisor.start()

        assert listening.heard == ["startup"] * 3 + ["fatal"]
        assert supervisor.pid is None


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (LoadProgress(WorkerStage.STARTING), "The worker is starting."),
        (LoadProgress(WorkerStage.WARM_UP, 0.0, "4 steps"), "The model is warming up (4 steps)."),
        (LoadProgress(WorkerStage.WEIGHTS, 0.4, "vae"), "The weights are being read (vae)."),
        (LoadProgress(WorkerStage.DOWNLOAD, None, "Another one fetches."), "Another one fetches."),
        (LoadProgress(WorkerStage.ASLEEP), "The worker is asleep."),
    ],
)
def test_what_it_is_at_is_said_in_a_sentence(progress, words) -> None:
    """Which `/health` and refusals hand on."""
    assert module._in_words(progress) == words
