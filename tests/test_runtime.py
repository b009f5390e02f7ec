"""The composition root: what is started is closed in reverse, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from app import runtime as module
from app.domain import Device, ImageSpec, LoadProgress, WorkerStage
from app.errors import DeadlineExceeded, Kind, StartupError, Unavailable
from app.images import OutputFormat
from app.images.pool import DecoderPool
from app.runtime import Runtime, build_runtime
from app.settings import Settings
from app.worker import supervisor
from app.worker.messages import Done, FromWorker, Generate, Stop, ToWorker
from tests.jobs.conftest import generated
from tests.support.adapter_files import SHAPES, write
from tests.support.fakes import INFO

SPEC = ImageSpec("a red circle", 128, 128, 4, 1.0, 7)
DEVICE = Device(None, "cpu", "cpu")
PNG = OutputFormat("png")


class Process:
    """A worker's process as the supervisor sees it; it says what the test says."""

    pid = 1

    def __init__(
        self, on_message: Callable[..., None], on_exit: Callable[..., None], calls: list[str]
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._calls = calls
        self.generates: list[str] = []
        self.asked = asyncio.Event()
        calls.append("start worker")

    def send(self, message: ToWorker) -> None:
        if isinstance(message, Generate):
            self.generates.append(message.job_id)
            self.asked.set()
        elif isinstance(message, Stop):
            self.exit(0)

    def kill(self) -> None:
        self.exit(-9)

    def exit(self, code: int) -> None:
        self._calls.append("end worker")
        self._on_exit(self, code)

    def say(self, message: FromWorker) -> None:
        self._on_message(self, message)

    async def wait(self) -> None:
        """It has gone."""


@pytest.fixture
def calls() -> list[str]:
    """What was started and ended, in order."""
    return []


@pytest.fixture
def processes() -> list[Process]:
    """Those that were started."""
    return []


@pytest.fixture
async def runtime(monkeypatch, calls, processes) -> AsyncIterator[Runtime]:
    """One that is built and not started; neither worker nor decoders get a process."""

    def begin(on_message: Callable[..., None], on_exit: Callable[..., None], *_: object) -> Process:
        processes.append(Process(on_message, on_exit, calls))
        return processes[-1]

    def note(word: str) -> Callable[[object], None]:
        return lambda _: calls.append(word)

    monkeypatch.setattr(supervisor, "launch", lambda *_: None)
    monkeypatch.setattr(supervisor, "WorkerProcess", begin)
    monkeypatch.setattr(DecoderPool, "start", note("start decoders"))
    monkeypatch.setattr(DecoderPool, "kill", note("end decoders"))
    built = build_runtime(Settings(model="shapes", device="cpu"), make_engine=lambda config: None)
    close = built.service.close
    monkeypatch.setattr(built.service, "close", lambda: (calls.append("end service"), close()))
    yield built
    await built.close()


async def test_it_starts_once_and_closes_in_reverse(runtime, calls) -> None:
    """Whoever starts it again, or closes it again, changes nothing."""
    async with runtime:
        await runtime.start()
        assert calls == ["start worker", "start decoders"]
    await runtime.close()

    assert calls[2:] == ["end decoders", "end worker", "end service"]


async def test_a_start_that_fails_half_way_is_undone(runtime, calls, monkeypatch) -> None:
    """The decoders cannot be started: the worker, which was, is ended, and the error comes out."""

    def fail(pool: DecoderPool) -> None:
        raise StartupError("There is no room for them.")

    monkeypatch.setattr(DecoderPool, "start", fail)
    with pytest.raises(StartupError):
        await runtime.start()

    assert calls == ["start worker", "end decoders", "end worker", "end service"]


async def test_it_is_ready_from_the_first_picture_on(runtime, processes) -> None:
    """Through the stages of a start; the gauges and the listeners know it at once."""
    heard = []
    runtime.on_ready.append(heard.append)
    async with runtime:
        (process,) = processes
        for stage in (WorkerStage.DOWNLOAD, WorkerStage.WEIGHTS, WorkerStage.WARM_UP):
            process.say(LoadProgress(stage, 0.5))
            status = runtime.service.status()
            assert (status.stage, status.is_ready, status.progress) == (stage, False, 0.5)
            assert runtime.metrics.registry.get_sample_value("klein_ready") == 0
        process.say(INFO)
        assert runtime.service.status().is_ready
        assert runtime.metrics.registry.get_sample_value("klein_ready") == 1
        assert heard == [INFO]


async def test_a_service_that_ends_fails_who_waits(runtime, processes) -> None:
    """The job that runs is the worker's to end; the one that waits is answered at once."""
    async with runtime:
        (process,) = processes
        process.say(INFO)
        running = asyncio.ensure_future(_ask(runtime))
        waiting = asyncio.ensure_future(_ask(runtime))
        await process.asked.wait()
        runtime.on_fatal(70, "The worker cannot be kept alive.")
        with pytest.raises(Unavailable) as refused:
            await waiting
        process.say(Done(process.generates[0], generated(SPEC)))

        assert refused.value.kind is Kind.WORKER_DOWN
        assert (await runtime.ended).exit_code == 70
        assert await running == 1
        runtime.on_fatal(1, "The second reason does not count.")
        assert runtime.ended.result().exit_code == 70


async def test_closing_fails_who_waits(runtime, processes) -> None:
    """A job that never ran is told so, and the running one ends with its worker."""
    async with runtime:
        processes[0].say(INFO)
        asked = [asyncio.ensure_future(_ask(runtime)) for _ in range(2)]
        await processes[0].asked.wait()
    first, second = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(first, Exception)
    assert isinstance(second, DeadlineExceeded)


async def test_a_drain_waits_for_what_was_accepted(runtime, processes) -> None:
    """Until it has ended, or the time is over."""
    async with runtime:
        processes[0].say(INFO)
        asked = asyncio.ensure_future(_ask(runtime))
        await processes[0].asked.wait()
        drained = asyncio.ensure_future(runtime.wait_until_drained(runtime.service.drain()))
        await asyncio.sleep(0)
        assert not drained.done()
        processes[0].say(Done(processes[0].generates[0], generated(SPEC)))
        await drained
        assert await asked == 1


async def test_the_service_gets_the_operators_limits() -> None:
    """KLEIN_MAX_PIXELS and KLEIN_MAX_REFERENCES, where the model's own are larger."""
    settings = Settings(device="cpu", model="/", max_pixels=2_000_000, max_references=2)
    built = build_runtime(settings, make_engine=lambda config: None)
    limits = built.service.limits
    await built.close()

    assert (limits.max_pixels, limits.max_references) == (2_000_000, 2)
    assert built.model.max_pixels > 2_000_000
    assert built.model.max_references > 2


def test_the_engine_gets_what_the_settings_say() -> None:
    """The parts of the settings that the worker reads."""
    settings = Settings(model="shapes", device="cpu", max_pixels=2_000_000, prompt_cache=3)
    choice = module.choose_model(settings, None)
    config = module._engine_config(settings, choice, DEVICE, module.choose_loras(settings, choice))

    assert (config.model, config.device, config.max_pixels) == ("shapes", None, 2_000_000)
    assert config.prompt_cache == 3
    assert config.place == DEVICE


async def _ask(runtime: Runtime) -> int:
    ticket = runtime.service.submit([SPEC], client="a", output=PNG)
    return len(await ticket.pictures())


async def test_adapters_are_listed_once_the_worker_is_ready(
    monkeypatch, tmp_path, processes, runtime
) -> None:
    """What the settings name goes to the worker and to the service; a missing one is a sentence."""
    folder = tmp_path / "loras"
    for name in ("ink", "grain"):
        write(folder / f"{name}.safetensors")
    configs = []
    monkeypatch.setattr(module, "Supervisor", partial(_noted, configs, module.Supervisor))
    settings = Settings.read(
        {"KLEIN_LORAS": "ink:0.8,gone", "KLEIN_LORA_FUSE": "grain:0.5", "KLEIN_LORA_RANK": "64"},
        model="shapes",
        device="cpu",
        cache_dir=tmp_path,
    )
    async with build_runtime(settings, make_engine=lambda config: None) as built:
        assert configs[0].lora_rank == 64
        assert [(lora.name, lora.scale) for lora in configs[0].lora_fuse] == [("grain", 0.5)]
        adapters = built.service.adapters
        assert adapters.listed() == ()
        processes[-1].say(replace(INFO, linear_shapes=SHAPES))
        async with asyncio.timeout(5):
            while not adapters.problems:  # noqa: ASYNC110 - a thread of the code under test does it
                await asyncio.sleep(0.005)
        assert {"ink", "grain"} <= {each.name for each in adapters.listed()}
        assert [(lora.name, lora.scale) for lora in adapters.default] == [("ink", 0.8)]
        assert adapters.fused == configs[0].lora_fuse
        assert "names gone" in adapters.problems[0]
        assert built.service.status().is_ready


def _noted(configs, make, make_engine, config, *given, **more):
    configs.append(config)
    return make(make_engine, config, *given, **more)


@pytest.mark.parametrize(("free_gb", "together"), [(1, 1), (6, 1), (10, 2), (60, 13)])
def test_so_many_workers_load_together_as_the_hosts_memory_holds(
    monkeypatch, free_gb: int, together: int
) -> None:
    """A machine of 16 GB with 6 of them free loads two cards' workers one after the other."""
    memory = SimpleNamespace(available=free_gb * 1_000_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)

    assert module._loads_at_once() == together
