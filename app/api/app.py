"""The app factory: the order of middleware and routers, and the lifespan of what they use."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware import Middleware

import app.images.png  # noqa: F401 - so that the first picture's file does not wait for numpy
from app import __version__
from app.api import errors
from app.api.config import ApiConfig
from app.api.middleware.auth import KeyCheck, KeyRing
from app.api.middleware.body_limit import BodyLimit
from app.api.middleware.cors import Origins, Preflights
from app.api.middleware.edge import Edge
from app.api.middleware.gates import Gates, HostCheck, OriginCheck
from app.api.middleware.target import Target, settled_path
from app.api.native import route as native_route
from app.api.openai import route as openai_route
from app.api.openai.image_store import ImageStore
from app.api.openai.kept_streams import LIFETIME_S, KeptStreams
from app.api.proxies import Proxies
from app.api.sdapi import response as sdapi_response
from app.api.sdapi import route as sdapi_route
from app.api.system import docs, health, jobs, loras, models, openapi, playground, sleep, tokens
from app.images.preparing import AUTO, TRANSPARENT
from app.runtime import Runtime, build_runtime
from app.settings import Settings
from app.telemetry.traces import start_traces

if TYPE_CHECKING:
    from app.telemetry.tracing import Traces

HEARTBEAT_S = 15.0
LINK_LIFETIME_S = 3600.0
TRACED = frozenset({
    "/generate", "/v1/images", "/v1/images/edits", "/v1/images/generations",
    "/sdapi/v1/img2img", "/sdapi/v1/txt2img",
})  # fmt: skip
"""Paths at which pictures are made: no other has a trace, and so no link to a picture has one."""
_ANYWHERE = frozenset({"0.0.0.0", "::", ""})


def create_app(
    settings: Settings,
    build: Callable[[Settings], Runtime] = build_runtime,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    link_lifetime_s: float = LINK_LIFETIME_S,
    kept_s: float = LIFETIME_S,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """Make the app.

    *build* makes the runtime when the lifespan starts; the other parameters are for tests.
    """
    traces = start_traces(os.environ)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with build(settings) as runtime:
            app.state.runtime = runtime
            yield
            await kept.close()
            sending = asyncio.create_task(asyncio.to_thread(traces.close)) if traces else None
        if sending is not None:
            await sending

    kept = KeptStreams(lifetime_s=kept_s)
    config = ApiConfig(
        is_strict=settings.unknown_fields == "refuse",
        has_aliases=settings.model_aliases,
        lists_aliases=settings.list_aliases,
        has_links=settings.image_urls,
        public_url=settings.public_url,
        heartbeat_s=heartbeat_s,
        repaints=AUTO if settings.mask == "auto" else TRANSPARENT,
    )
    app = FastAPI(
        title="klein-server",
        version=__version__,
        lifespan=lifespan,
        telemetry=_telemetry(traces),
        middleware=_middleware(settings, traces),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app, config, *([sdapi_response.ERRORS] if settings.sdapi else []))
    for router in (
        native_route.build_router(config),
        openai_route.build_router(
            config, ImageStore(lifetime_s=link_lifetime_s, clock=clock), kept
        ),
        models.build_router(config),
        jobs.router,
        loras.router,
        tokens.build_router(config),
        health.router,
        playground.build_router(),
        *([sdapi_route.build_router()] if settings.sdapi else []),
        *([sleep.router] if settings.sleep_api else []),
    ):
        app.include_router(router)
    if settings.docs:
        app.include_router(
            docs.build_router(config, lambda service: openapi.describe(app, service, config))
        )
    return app


def _telemetry(traces: Traces | None) -> TelemetryConfig:
    """Have FastAPI make server spans and nothing else, whatever the process has been set up with.

    Its logs would have the texts of exceptions.
    """

    def is_left_out(scope: MutableMapping[str, Any]) -> bool:
        return settled_path(scope["path"]) not in TRACED

    return {
        "tracer_provider": traces.provider if traces else None,
        "tracing": traces is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": is_left_out,
    }


def _middleware(settings: Settings, traces: Traces | None) -> list[Middleware]:
    """List the middleware, outermost first; a valid key is checked first: it permits any host."""
    proxies, origins = Proxies(settings.trusted_proxies), Origins(settings.allowed_origins)
    check_key = KeyCheck(
        KeyRing(settings.api_keys),
        proxies,
        is_metrics_open=settings.metrics_key == "open",
        password_prefixes=(sdapi_response.ERRORS.prefix,) if settings.sdapi else (),
    )
    return [
        Middleware(Edge, origins=origins, traces=traces),
        Middleware(Target, proxies=proxies),
        Middleware(Preflights, origins=origins),
        Middleware(Gates, checks=(check_key, HostCheck(_hosts(settings)), OriginCheck(origins))),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes, limit_s=settings.body_limit_s),
    ]


def _hosts(settings: Settings) -> tuple[str, ...]:
    """Collect the host names: those listed, and those of the public URL and the bind address."""
    public = urlsplit(settings.public_url or "").hostname
    bound = None if settings.host in _ANYWHERE else settings.host
    return (*settings.allowed_hosts, *filter(None, (public, bound)))
