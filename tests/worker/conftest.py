"""Real worker processes with the scripted engine, and someone who listens to what becomes of
them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from app.domain import ImageSpec, ModelInfo
from app.engine.config import EngineConfig
from app.worker.supervisor import Supervisor, TimeLimits
from tests.support.scripted_engine import MakeScriptedEngine, Script

CONFIG = EngineConfig(model="shapes", path=None, cache_dir="", device=None)
SPEC = ImageSpec("a red circle", 64, 64, 4, 1.0, 7)


class Listening:
    """Remembers the worker's fate; `wait_for` returns once a word has been heard so often."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.fatal: tuple[int, str] | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_worker_ready(self, info: ModelInfo, seconds: float) -> None:
        self._hear("ready")

    def on_worker_lost(self, reason: str) -> None:
        self._hear(reason)

    def on_fatal(self, exit_code: int, message: str) -> None:
        self.fatal = (exit_code, message)
        self._hear("fatal")

    async def wait_for(self, word: str, times: int = 1) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: self.heard.count(word) >= times)

    def _hear(self, word: str) -> None:
        self.heard.append(word)
        task = asyncio.ensure_future(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


Supervise = Callable[..., "asynccontextmanager[tuple[Supervisor, Listening]]"]


@pytest.fixture
def supervise() -> Supervise:
    @asynccontextmanager
    async def start(
        *script: str, limits: TimeLimits | None = None, step_s: float = 0.0, config: object = CONFIG
    ) -> AsyncIterator[tuple[Supervisor, Listening]]:
        listening = Listening()
        supervisor = Supervisor(
            MakeScriptedEngine(Script.parse(list(script))),
            config,
            listening,
            predict_step_s=lambda spec: step_s,
            limits=limits,
        )
        supervisor.start()
        try:
            yield supervisor, listening
        finally:
            await supervisor.close()

    return start
