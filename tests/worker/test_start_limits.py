"""What the limit of a start counts: loading, not a download that goes on. Time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.domain import LoadProgress, ModelInfo
from app.runtime import build_runtime
from app.settings import Settings
from app.worker import supervisor as module
from app.worker.messages import StartFailed
from app.worker.supervisor import EXIT_CRASH_LOOP, EXIT_START_FAILED, Supervisor, TimeLimits
from tests.worker.conftest import CONFIG, Listening

INFO = ModelInfo("m", "r", "cpu", "fp32", "", "host", (), (), "none", None)
LIMITS = TimeLimits(load_s=1800.0, download_s=180.0)


class Clock:
    """Stands in for the loop's timers: `pass_s` lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], object], asyncio.TimerHandle]] = []

    def call_later(self, delay: float, callback, *arguments) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        timer = asyncio.TimerHandle(self.now + delay, callback, arguments, loop)
        self._timers.append((self.now + delay, lambda: callback(*arguments), timer))
        return timer

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        due = [each for each in self._timers if each[0] <= self.now]
        self._timers = [each for each in self._timers if each[0] > self.now]
        for _, call, timer in due:
            if not timer.cancelled():
                call()


class Handle:
    """A worker process that does as it is told, and goes when it is killed."""

    pid = 1

    def __init__(self, on_message, on_exit, *_) -> None:
        self._on_exit = on_exit
        self.is_killed = False

    def send(self, message) -> None:
        """Nothing is asked of it."""

    def kill(self) -> None:
        if not self.is_killed:
            self.is_killed = True
            self._on_exit(self, -9)

    async def wait(self) -> None:
        """It has gone."""


@pytest.fixture
async def started(monkeypatch):
    """A supervisor whose worker has just been started, its clock, and who listens."""
    clock, listening = Clock(), Listening()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", clock.call_later)
    monkeypatch.setattr(module, "WorkerProcess", Handle)
    monkeypatch.setattr(module, "launch", lambda *_: None)
    supervisor = Supervisor(lambda _: None, CONFIG, listening, limits=LIMITS)
    supervisor.start()
    yield supervisor, clock, listening
    await supervisor.close()


def say(supervisor: Supervisor, stage: str) -> None:
    """Report *stage* as the worker does."""
    supervisor.on_message(supervisor._handle, LoadProgress(stage, 0.5))


@pytest.mark.parametrize("stage", ["download", "verify"])
async def test_a_download_may_take_a_day(started, stage) -> None:
    """12.3 GB over a line of 1 Mbit/s, and the limit of loading is whole afterwards."""
    supervisor, clock, listening = started
    for _ in range(1000):
        say(supervisor, stage)
        clock.pass_s(100)
    say(supervisor, "weights")
    clock.pass_s(1799)
    supervisor.on_message(supervisor._handle, INFO)
    clock.pass_s(100_000)

    assert supervisor.is_ready
    assert listening.heard == ["ready"]


async def test_a_download_that_says_nothing_is_ended(started) -> None:
    """The sentence says that what came is kept, instead of pointing at the log."""
    supervisor, clock, listening = started
    say(supervisor, "download")
    clock.pass_s(179)
    say(supervisor, "download")
    clock.pass_s(179)
    assert listening.fatal is None
    clock.pass_s(1)

    assert listening.fatal is not None
    code, sentence = listening.fatal
    assert code == EXIT_START_FAILED
    assert "download for 180 s" in sentence
    assert "start again to go on from there" in sentence


@pytest.mark.parametrize("has_downloaded", [False, True])
async def test_loading_that_takes_too_long_names_its_setting(started, has_downloaded) -> None:
    """Progress of other stages does not put the end off."""
    supervisor, clock, listening = started
    if has_downloaded:
        say(supervisor, "download")
    for _ in range(19):
        say(supervisor, "weights")
        clock.pass_s(100)

    assert listening.fatal is not None
    assert "longer than 1800 s" in listening.fatal[1]
    assert "KLEIN_LOAD_LIMIT_S" in listening.fatal[1]


async def test_a_second_worker_has_the_same_limits(started) -> None:
    """What the first was at when it died does not count for the next."""
    supervisor, clock, listening = started
    supervisor.on_message(supervisor._handle, INFO)
    supervisor._handle.kill()
    clock.pass_s(0)
    say(supervisor, "download")
    supervisor._handle.kill()
    clock.pass_s(10)
    clock.pass_s(1799)
    assert supervisor._handle is not None
    assert not supervisor._handle.is_killed
    clock.pass_s(1)

    assert listening.heard == ["ready", "killed", "startup", "startup", "fatal"]


@pytest.mark.parametrize("is_first", [True, False])
async def test_starts_that_take_long_to_die_end_the_service_too(started, is_first) -> None:
    """The third in a row is the last, the first start or another; ten minutes do not span it."""
    supervisor, clock, listening = started
    supervisor._clock = lambda: clock.now
    if not is_first:
        supervisor.on_message(supervisor._handle, INFO)
        supervisor._handle.kill()
        clock.pass_s(1000)
    for _ in range(3):
        clock.pass_s(1000)
        supervisor._handle.kill()
        clock.pass_s(10)

    assert listening.heard[-4:] == ["startup", "startup", "startup", "fatal"]
    assert listening.fatal is not None
    assert listening.fatal[0] == EXIT_CRASH_LOOP
    assert "3 times in a row before it was ready" in listening.fatal[1]


async def test_the_settings_reach_the_supervisor() -> None:
    """The worker gives up by itself first; the supervisor is there for one that hangs."""
    settings = Settings(model="shapes", device="cpu", download_silence_s=7, load_limit_s=11)
    limits = build_runtime(settings).workers.workers[0].supervisor._limits

    assert limits.load_s == 11
    assert 7 < limits.download_s <= 7 + 60


async def test_callers_are_not_told_what_the_operator_is(started) -> None:
    """The sentence names paths and settings; whoever asks for the state needs no key."""
    supervisor, _, listening = started
    sentence = "There is no model at /home/alice/weights; correct the path and start again."
    supervisor.on_message(supervisor._handle, StartFailed(sentence))

    assert listening.fatal == (EXIT_START_FAILED, sentence)
    assert supervisor.progress.stage == "failed"
    assert supervisor.reason
    assert "alice" not in supervisor.reason
