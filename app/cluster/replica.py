"""A replica of Ray Serve that is this service itself: the ASGI app, its queue and its worker.

Serve's YAML names `application` (`klein cluster config` writes it). Serve begins to route to a
replica when the app's lifespan has started, which for `klein serve` is before the model is loaded;
here it is held until the model has made its warm-up picture.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.types import Message, Receive, Scope, Send

from app import logs
from app.api.app import create_app
from app.cluster.deployment import MAX_ONGOING_REQUESTS, NAME, check_exposure
from app.cluster.environ import has_haproxy
from app.domain import ModelInfo
from app.engine import create_engine
from app.errors import StartupError
from app.model_choice import read_settings
from app.runtime import Runtime, build_runtime
from app.settings import Settings
from app.worker.child import EngineFactory

_REQUEST_ID = b"x-request-id"


class HeldApp:
    """The ASGI app of one service, which has started when its model can be used."""

    def __init__(self, settings: Settings, make_engine: EngineFactory = create_engine) -> None:
        self._make_engine = make_engine
        self._runtime: Runtime | None = None
        self._ready = asyncio.Event()
        self.app: FastAPI = create_app(settings, self._build)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; hold the lifespan's start.

        Raises:
            StartupError: in the lifespan, where the model cannot be loaded.
        """

        async def hold(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                # An error that is raised here closes the runtime again, and starlette reports it.
                await self._wait_until_ready()
            await send(message)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _without_repeated(scope, message["headers"])
            elif message["type"] == "http.response.body":
                # Serve's own proxy, which stands in while HAProxy knows no replica, pickles it.
                message["body"] = bytes(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, hold if scope["type"] == "lifespan" else answer)

    def check(self) -> None:
        """Raise an error where the service has given up, so that Serve replaces the replica.

        Raises:
            StartupError: it has; the message says why.
        """
        if self._runtime is not None and self._runtime.ended.done():
            raise StartupError(self._runtime.ended.result().message)

    def _build(self, settings: Settings) -> Runtime:
        runtime = build_runtime(settings, make_engine=self._make_engine)
        runtime.on_ready.append(self._on_ready)
        self._runtime = runtime
        return runtime

    def _on_ready(self, info: ModelInfo) -> None:
        self._ready.set()

    async def _wait_until_ready(self) -> None:
        assert self._runtime is not None
        ready = asyncio.ensure_future(self._ready.wait())
        either: set[asyncio.Future[Any]] = {ready, self._runtime.ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        self.check()


class Replica:
    """What Serve's controller asks of a replica; requests go to the app itself."""

    app: HeldApp

    def check_health(self) -> None:
        """Raise an error where the service has given up.

        Raises:
            StartupError: as `HeldApp.check`.
        """
        self.app.check()


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the application, as the `import_path` of Serve's YAML asks for it.

    *arguments* are none: the settings come from `env_vars` of the YAML's `runtime_env`.
    """
    return bind(create_engine)


def bind(
    make_engine: EngineFactory, make_app: Callable[[Settings, EngineFactory], HeldApp] = HeldApp
) -> serve.Application:
    """Return the application whose replicas compute with *make_engine*.

    The parameters are for tests.
    """

    def build_app() -> HeldApp:
        settings = read_settings(os.environ)
        logs.set_up(style=settings.log_format, level=settings.log_level)
        check_exposure(settings, has_haproxy=has_haproxy(os.environ))
        return make_app(settings, make_engine)

    # A function, which is called in the replica: an app would be pickled.
    replica = serve.deployment(serve.ingress(build_app)(Replica))
    options = replica.options(name=NAME, max_ongoing_requests=MAX_ONGOING_REQUESTS)
    application: serve.Application = options.bind()
    return application


def _without_repeated(
    scope: Scope, headers: list[tuple[bytes, bytes]]
) -> list[tuple[bytes, bytes]]:
    """Leave out the request's id: Serve adds it to each answer, and to the request before."""
    asked = dict(scope["headers"]).get(_REQUEST_ID)
    return [pair for pair in headers if pair != (_REQUEST_ID, asked)]
