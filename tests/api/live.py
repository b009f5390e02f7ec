"""A service for the live tests, as a process of its own, with times that a test can wait for.

    python -m tests.api.live heartbeat=0.2 lifetime=2 [oom@1 slow=0.2 ...]

It is `klein serve` but for the app's parameters, which no setting reaches. With a script of
`tests.support.scripted_engine` its engine is the scripted one, which here shows previews, draws a
texture (so that the quality of a JPEG can be seen in its size), and has one more fault, `late@n`:
the job misses its deadline.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import uvicorn

from app import logs
from app.api.app import create_app
from app.cli.serve import address, bind
from app.domain import Generated, ImageSpec, Progress, RawImage, Stage
from app.engine import create_engine
from app.engine.config import EngineConfig
from app.errors import DeadlineExceeded
from app.runtime import Runtime, build_runtime
from app.settings import Settings
from tests.support import scripted_engine

_log = logging.getLogger("app.live")


class PreviewingEngine(scripted_engine.ScriptedEngine):
    """Shows all previews at the start, before any fault strikes."""

    def generate(
        self,
        spec: ImageSpec,
        on_progress: Callable[[Progress], None],
        is_cancelled: Callable[[], bool],
    ) -> Generated:
        """Do as scripted, with previews."""
        steps = spec.num_inference_steps
        for number in range(spec.previews):
            shown = RawImage(16, 16, bytes([number, 0, 0]) * 256)
            on_progress(Progress(Stage.DENOISE, number, steps, shown))
        if self._script.faults.get(self._count + 1) == "late":
            self._count += 1
            raise DeadlineExceeded("The picture was not done when its time was over.")
        made = super().generate(spec, on_progress, is_cancelled)
        grain = hashlib.sha512(f"{spec.prompt}|{spec.seed}".encode()).digest()
        size = 3 * spec.width * spec.height
        pixels = (grain * (size // len(grain) + 1))[:size]
        return replace(made, image=RawImage(spec.width, spec.height, pixels))


@dataclass(frozen=True)
class MakePreviewing:
    """Builds the engine inside the worker process; it pickles with its script."""

    script: scripted_engine.Script

    def __call__(self, config: EngineConfig) -> PreviewingEngine:
        """Build it."""
        return PreviewingEngine(config, self.script)


async def serve(settings: Settings, words: list[str]) -> None:
    """Serve until SIGTERM."""
    given = dict(word.split("=") for word in words if word.startswith(("heartbeat=", "lifetime=")))
    script = [word for word in words if word.partition("=")[0] not in given]
    make_engine = MakePreviewing(scripted_engine.Script.parse(script)) if script else create_engine
    listener = bind(settings)
    url = address(listener)

    def build(settings: Settings) -> Runtime:
        _log.info("Listening at %s while the model is loaded.", url)
        runtime = build_runtime(settings, make_engine=make_engine)
        runtime.on_ready.append(lambda info: _log.info("Ready at %s", url))
        return runtime

    app = create_app(
        settings,
        build,
        heartbeat_s=float(given.get("heartbeat", 15)),
        link_lifetime_s=float(given.get("lifetime", 3600)),
    )
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    from tests.api import live

    settings = Settings.read(os.environ)
    logs.set_up(style="text", level="info")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Through the module's own name, so that the worker process finds the classes under it.
    asyncio.run(live.serve(settings, sys.argv[1:]))
