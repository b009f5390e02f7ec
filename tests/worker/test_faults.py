"""Whatever goes wrong between the two processes: the worker is ended, replaced, and the service
gives up after the third time; nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import GenerationFailed, InvalidRequest, Kind, Unavailable, WorkerLost
from app.request_context import RequestContext, current_request
from app.worker.process import Launched
from app.worker.supervisor import EXIT_CRASH_LOOP, EXIT_START_FAILED, TimeLimits
from tests.support.scripted_engine import Unreadable, draw
from tests.worker.conftest import SPEC

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LATE = "stay=60"
SOON = TimeLimits(close_s=0.2)


def ignore(progress) -> None:
    """Nobody listens."""


@contextmanager
def no_descriptors() -> Iterator[None]:
    """No file, pipe or socket can be opened meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_start_without_descriptors_is_tried_again(supervise) -> None:
    """The first start fails, the second does not."""
    start = supervise()
    with no_descriptors():
        supervisor, listening = await start.__aenter__()
    try:
        await listening.wait_for("ready")
        generated = await supervisor.run("a", SPEC, ignore)

        assert generated.image == draw(SPEC)
        assert listening.heard == ["startup", "ready"]
    finally:
        await start.__aexit__(None, None, None)


def descriptors() -> int:
    """How many are open once the threads of workers have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("worker pipe"):
            thread.join(10)
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_worker_that_has_gone_leaves_no_descriptor_open(supervise) -> None:
    """Nor waits for a round of the garbage collector to close it."""
    counts = []
    for _ in range(3):
        async with supervise() as (_supervisor, listening):
            await listening.wait_for("ready")
        counts.append(descriptors())

    assert counts[0] == counts[1] == counts[2]


@pytest.mark.full
async def test_a_restart_without_descriptors_is_tried_again(supervise) -> None:
    """The worker was killed for want of memory, and its successor fails for want of others."""
    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        with no_descriptors():
            os.kill(supervisor.pid, signal.SIGKILL)
            await listening.wait_for("startup")
        await listening.wait_for("ready", 2)

        assert listening.heard == ["ready", "killed", "startup", "ready"]


@pytest.mark.full
async def test_starts_that_always_fail_end_the_service(supervise) -> None:
    """Here for a reason that is none of the machine's: the configuration cannot be sent."""
    async with supervise(config=threading.Lock()) as (supervisor, listening):
        await listening.wait_for("fatal")
        with pytest.raises(Unavailable):
            await supervisor.run("a", SPEC, ignore)

    assert listening.heard == ["startup", "startup", "startup", "fatal"]
    assert listening.fatal is not None
    assert listening.fatal[0] == EXIT_CRASH_LOOP
    assert "could not be started 3 times" in listening.fatal[1]


@pytest.mark.full
async def test_a_first_worker_that_dies_without_a_word_is_replaced(supervise, tmp_path) -> None:
    """It was killed, not refused: nothing is said against the model."""
    async with supervise("startexit", f"once={tmp_path / 'once'}") as (_supervisor, listening):
        await listening.wait_for("ready")

    assert listening.heard == ["startup", "ready"]


async def test_what_the_parent_cannot_read_costs_the_worker(supervise, tmp_path) -> None:
    """Its job is failed and a fresh worker makes the next."""
    once = f"once={tmp_path / 'once'}"
    async with supervise("unreadable@1", once) as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(WorkerLost):
            await supervisor.run("a", SPEC, ignore)
        await supervisor.run("b", SPEC, ignore)

        assert listening.heard == ["ready", "killed", "ready"]


@pytest.mark.full
async def test_what_the_worker_cannot_read_costs_the_worker(supervise) -> None:
    """The other way."""
    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(WorkerLost):
            await supervisor.run("a", replace(SPEC, prompt=Unreadable()), ignore)
        await supervisor.run("b", SPEC, ignore)

        assert listening.heard == ["ready", "killed", "ready"]


async def test_what_cannot_be_sent_costs_its_job_alone(supervise) -> None:
    """Down and up: the pipe is whole, so the worker stays."""
    async with supervise("unsendable@1") as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(GenerationFailed):
            await supervisor.run("a", replace(SPEC, prompt=threading.Lock()), ignore)
        with pytest.raises(GenerationFailed):
            await supervisor.run("b", SPEC, ignore)
        await supervisor.run("c", SPEC, ignore)

        assert listening.heard == ["ready"]


async def test_a_message_that_cannot_be_sent_is_told_with_its_job(
    supervise, caplog, capfd, monkeypatch
) -> None:
    """Down and up; down with the id that its client quotes."""
    named: list[str] = []

    def note(record) -> bool:
        context = current_request.get(None)
        named.append(context.id if context else "")
        return True

    monkeypatch.setattr(caplog.handler, "filters", [note])
    async with supervise("unsendable@1") as (supervisor, listening):
        await listening.wait_for("ready")
        naming = current_request.set(RequestContext("req_1"))
        for job_id, spec in (("down", replace(SPEC, prompt=threading.Lock())), ("up", SPEC)):
            with pytest.raises(GenerationFailed):
                await supervisor.run(job_id, spec, ignore)
        current_request.reset(naming)

    assert caplog.messages == [
        "A message to the other process could not be written down, job=down."
    ]
    assert named == ["req_1"]
    assert "could not be written down, job=up." in capfd.readouterr().err


@pytest.mark.full
async def test_a_listener_that_fails_costs_neither_job_nor_worker(supervise) -> None:
    """What a caller does with its progress is its own affair."""

    def fail(progress) -> None:
        raise LookupError

    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        await supervisor.run("a", SPEC, fail)

        assert listening.heard == ["ready"]


async def test_a_worker_that_lost_its_card_and_stays_is_killed(supervise, tmp_path) -> None:
    """It has a few seconds to leave; the next job does not wait for more."""
    script = ("sticky@1", LATE, f"once={tmp_path / 'once'}")
    async with supervise(*script, limits=SOON) as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(WorkerLost):
            await supervisor.run("a", SPEC, ignore)
        await supervisor.run("b", SPEC, ignore)

        assert listening.heard == ["ready", "fatal_cuda", "ready"]


@pytest.mark.full
async def test_a_worker_that_could_not_load_and_stays_is_killed(supervise) -> None:
    """The service ends with the model's own words, and the process is not left behind."""
    async with supervise("startfail", LATE, limits=SOON) as (supervisor, listening):
        pid = supervisor.pid
        await listening.wait_for("fatal")

    assert listening.fatal is not None
    assert listening.fatal[0] == EXIT_START_FAILED
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.system
async def test_a_worker_that_is_told_to_stop_and_stays_is_killed(supervise) -> None:
    """Closing takes as long as the limit says."""
    async with supervise(LATE, limits=SOON) as (supervisor, listening):
        await listening.wait_for("ready")
        pid, started = supervisor.pid, time.monotonic()

    assert time.monotonic() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.full
async def test_a_worker_that_not_even_sigkill_ends_is_left_to_itself(
    supervise, monkeypatch, caplog
) -> None:
    """As one that waits in its card's driver: closing comes to an end all the same."""
    async with supervise(LATE, limits=SOON) as (supervisor, listening):
        await listening.wait_for("ready")
        pid = supervisor.pid
        monkeypatch.setattr(Launched, "kill", lambda launched: None)
        os.kill(pid, signal.SIGSTOP)

    os.kill(pid, signal.SIGKILL)
    assert f"process {pid}, was killed and does not go" in caplog.text


ABANDON = """
import asyncio, os, signal
from app.worker.process import Launched
from app.worker.supervisor import TimeLimits
from tests.support.scripted_engine import MakeScriptedEngine, Script
from tests.worker.conftest import CONFIG, Listening, Supervisor

async def main():
    listening = Listening()
    engine = MakeScriptedEngine(Script.parse([]))
    supervisor = Supervisor(engine, CONFIG, listening, limits=TimeLimits(close_s=0.1))
    supervisor.start()
    await listening.wait_for("ready")
    print(supervisor.pid, flush=True)
    os.kill(supervisor.pid, signal.SIGSTOP)
    await supervisor.close()

Launched.kill = lambda launched: None
asyncio.run(main())
"""


def test_a_process_ends_though_its_worker_does_not() -> None:
    """Python waits for every child when it ends, and would wait for ever for one in a driver."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ABANDON], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert parent.wait(10) == 0
        os.kill(pid, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.communicate()


async def test_an_idle_worker_that_stands_still_is_replaced(supervise) -> None:
    """A stopped process answers nothing; until it was asked it counted as ready."""
    limits = TimeLimits(beat_s=0.05, silence_idle_s=0.2)
    async with supervise(limits=limits) as (supervisor, listening):
        await listening.wait_for("ready")
        os.kill(supervisor.pid, signal.SIGSTOP)
        await listening.wait_for("heartbeat")
        await listening.wait_for("ready", 2)
        await supervisor.run("a", SPEC, ignore)

        assert listening.heard == ["ready", "heartbeat", "ready"]


@pytest.mark.system
async def test_a_service_that_stood_still_does_not_blame_its_worker(supervise) -> None:
    """As when both are paused together: it was not asked, so it owes no answer."""
    limits = TimeLimits(beat_s=0.05, silence_idle_s=0.2)
    async with supervise(limits=limits) as (supervisor, listening):
        await listening.wait_for("ready")
        time.sleep(0.5)  # noqa: ASYNC251  # the event loop's standing still is what is tested
        await supervisor.run("a", SPEC, ignore)

        assert listening.heard == ["ready"]


@pytest.mark.system
async def test_a_worker_at_work_or_loading_is_not_asked(supervise) -> None:
    """It answers between jobs; a job and a start have limits of their own."""
    limits = TimeLimits(beat_s=0.02, silence_idle_s=0.1)
    async with supervise("load=0.3", "slow=0.5", limits=limits) as (supervisor, listening):
        await listening.wait_for("ready")
        await supervisor.run("a", SPEC, ignore)

        assert listening.heard == ["ready"]


async def test_after_the_end_nobody_waits_for_a_worker(supervise) -> None:
    """Neither who came before the end nor who comes after it."""
    async with supervise("load=60", limits=SOON) as (supervisor, _listening):
        before = asyncio.ensure_future(supervisor.run("a", SPEC, ignore))
        await asyncio.sleep(0)
    for job in (before, supervisor.run("b", SPEC, ignore)):
        with pytest.raises(Unavailable) as refused:
            await asyncio.wait_for(job, 5)
        assert refused.value.kind is Kind.DRAINING


async def test_a_worker_killed_on_request_has_no_successor(supervise) -> None:
    """Nor one whose start was already planned."""
    lost = asyncio.Event()

    def insist(reason: str) -> None:
        supervisor.kill()
        lost.set()

    async with supervise() as (supervisor, listening):
        await listening.wait_for("ready")
        listening.on_worker_lost = insist
        os.kill(supervisor.pid, signal.SIGKILL)
        await lost.wait()
        for _ in range(3):
            await asyncio.sleep(0)

        assert supervisor.pid is None


async def test_an_error_comes_back_as_what_it_is(supervise) -> None:
    """The caller's own fault, with the field and the code."""
    async with supervise("invalid@1") as (supervisor, listening):
        await listening.wait_for("ready")
        with pytest.raises(InvalidRequest) as refused:
            await supervisor.run("a", SPEC, ignore)

    assert (refused.value.param, refused.value.code) == ("image", "too_narrow")


async def test_the_workers_lines_name_the_request(supervise, capfd) -> None:
    """So that the id which a client quotes leads to the traceback, and to no other."""
    async with supervise("leak@1", "leak@2") as (supervisor, listening):
        await listening.wait_for("ready")
        for name in ("one", "two"):
            naming = current_request.set(RequestContext(name))
            with pytest.raises(GenerationFailed):
                await supervisor.run(f"job {name}", SPEC, ignore)
            current_request.reset(naming)

    lines = [line for line in capfd.readouterr().err.splitlines() if "nobody foresaw" in line]
    assert [line.partition("job=")[2] for line in lines] == [
        "job one. request_id=one",
        "job two. request_id=two",
    ]
