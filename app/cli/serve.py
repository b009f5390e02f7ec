"""`klein serve`: bind the port, run the service, drain it at its end.

Uvicorn closes its socket at the first SIGTERM; a load balancer would then see refused connections
while jobs are still running. So the signals are handled here: the first makes /health/ready return
503 while the port still listens and every accepted job is finished and its response sent; the
second ends the process at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from app import logs
from app.cli import first_lines
from app.cli.console import LOADING, Options
from app.cli.old_cache import find_old_cache
from app.cli.system_limits import bound_heap, raise_file_limit
from app.domain import ModelInfo
from app.engine import create_engine
from app.errors import StartupError
from app.runtime import Ended, Runtime, build_runtime
from app.settings import Settings, check_exposure
from app.telemetry.cards import Cards
from app.worker.child import EngineFactory

if TYPE_CHECKING:
    from app.api.server import Server

_log = logging.getLogger("app.serve")

EXIT_SECOND_SIGNAL = 143
_INSISTED_S = 2.0
"""After the second signal: what has not ended by then, a thread above all, is not awaited."""
_LAST_ANSWERS_S = 25.0
"""For responses still being read after the last deadline.

With the five seconds that a worker may take to exit, these are the 30 s by which the grace period
is longer than the deadline.
"""

END_S = 5.0
"""Seconds that the service may take to exit once it has given up, responses in flight included."""


OPTIONS: Options = {
    "--host": {"help": "address to listen on (KLEIN_HOST)"},
    "--port": {"type": int, "help": "port to listen on (KLEIN_PORT)"},
    **LOADING,
}


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Serve until a signal ends it; return the exit code."""
    if arguments.json:
        settings = settings.model_copy(update={"log_format": "json"})
    return serve(settings)


def serve(
    settings: Settings, *, make_engine: EngineFactory = create_engine, cards: Cards | None = None
) -> int:
    """Serve with *settings*; tests pass *make_engine* and *cards* to the composition root."""
    logs.set_up(style=settings.log_format, level=settings.log_level)
    bound_heap()
    check_exposure(settings)
    if (old := find_old_cache(settings)) is not None:
        _log.warning("%s", old.sentence)
    try:
        with contextlib.closing(bind(settings)) as listener:
            return asyncio.run(_run(settings, listener, make_engine, cards))
    finally:
        # Before anything else is logged at the end.
        logs.flush()


async def _run(
    settings: Settings, listener: socket.socket, make_engine: EngineFactory, cards: Cards | None
) -> int:
    runtime = build_runtime(settings, make_engine=make_engine, cards=cards)
    _log.info("Listening at %s while the model is loaded.", address(listener))
    host, port = listener.getsockname()[:2]
    _log.info("%s", first_lines.reach(host, port, settings))
    _log.info("%s", first_lines.needs(settings, runtime.choice))
    # The app, once there is one, closes it first.
    async with runtime:
        # Not earlier: it takes up to a second, in which the worker runs its own imports already.
        from app.api.app import create_app
        from app.api.server import make_server

        server = make_server(
            create_app(settings, lambda _: runtime),
            descriptors=_descriptors(),
            trusted_proxies=settings.trusted_proxies,
        )
        # Existing objects are permanent; traversing them would stop every request for a tenth of a
        # second.
        gc.freeze()
        return await _Service(listener, runtime, server, settings.deadline_s).run()


def _descriptors() -> int:
    """Return the limit of file descriptors; log one too low for the usual connections."""
    from app.api.http_limits.connections import MAX_CONNECTIONS, connection_limit

    descriptors = raise_file_limit()
    limit = connection_limit(descriptors)
    if limit < MAX_CONNECTIONS:
        _log.warning(
            "At most %d connections at a time, since only %d files may be open; raise the limit "
            "(ulimit -n) for more.",
            limit,
            descriptors,
        )
    return descriptors


@dataclass(slots=True)
class _Service:
    """The life of one service process from its first request on: serve, drain, end."""

    _listener: socket.socket
    _runtime: Runtime
    _server: Server
    _deadline_s: float
    _exit_code: int = 0
    _draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        self._runtime.on_ready.append(
            partial(_say_ready, address(self._listener), self._runtime.model.note)
        )
        self._runtime.ended.add_done_callback(self._on_ended)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await self._server.serve(sockets=[self._listener])
        return self._exit_code if self._server.started else 1

    def _on_signal(self) -> None:
        if self._draining is not None:
            self._runtime.kill()
            self._server.should_exit = True
            self._server.force_exit = True
            self._exit_code = EXIT_SECOND_SIGNAL
            _leave_within(_INSISTED_S, EXIT_SECOND_SIGNAL)
            return
        _log.info("Told to stop: taking nothing new, finishing what was accepted.")
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        """Finish every accepted job, then wait for its client to read the response.

        The wait is as long as a job that was accepted at the last moment might have taken.
        """
        loop = asyncio.get_running_loop()
        budget_s = self._runtime.service.drain()
        ends_at = loop.time() + max(budget_s, self._deadline_s) + _LAST_ANSWERS_S
        await self._runtime.wait_until_drained(budget_s)
        self._server.end(answers_s=ends_at - loop.time())

    def _on_ended(self, future: asyncio.Future[Ended]) -> None:
        ended = future.result()
        logs.say(f"klein: {ended.message}")
        self._exit_code = ended.exit_code
        self._server.end()
        _leave_within(END_S, ended.exit_code)


def _leave_within(seconds: float, exit_code: int) -> None:
    """End this process after *seconds*, whatever it waits for then.

    A service that has given up, or was told twice to stop, waits for nothing. The kernel's timer
    is used, since threads and file descriptors may be what is exhausted. An earlier end stays.
    """
    if 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds:
        return
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(exit_code))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def address(listener: socket.socket) -> str:
    """Return the URL at which *listener* can be reached from this machine."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say_ready(url: str, note: str, info: ModelInfo) -> None:
    """One line each: model, precision, plan, address, first request."""
    _log.info(
        "Model %s on %s, loaded in %.1f s.%s",
        info.model,
        info.device,
        info.load_s,
        f" {note}" if note else "",
    )
    _log.info("Precision %s: %s.", info.precision, info.precision_reason)
    _log.info("Memory plan %s: %s.", info.plan, "; ".join(info.plan_reasons))
    _log.info("Ready at %s (pages: /docs, /metrics, /health).", url)
    _log.info(
        "First request: curl -X POST %s/generate -H 'content-type: application/json' "
        '-d \'{"prompt":"a red circle"}\' -o a.png',
        url,
    )


def bind(settings: Settings) -> socket.socket:
    """Take the port before anything heavy is started."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol: asyncio switches Nagle's delay of 40 ms off only where TCP is named.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        raise StartupError(
            f"Port {settings.port} of {settings.host} cannot be taken ({error.strerror}); "
            "stop what uses it or choose another with --port."
        ) from None
    listener.setblocking(False)
    return listener
