"""The process that workers are forked from: it has imported what they need and touched no card.

A forked worker has its modules at once and shares their memory. It is `multiprocessing`'s fork
server, of which a process has one; where it cannot be had, workers are spawned.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TypeVar

_log = logging.getLogger(__name__)

Context = SpawnContext | ForkServerContext
"""What starts a process."""
_Made = TypeVar("_Made")

_SPAWN = multiprocessing.get_context("spawn")
_FORK = multiprocessing.get_context("forkserver")
_FIRST = ("app.worker.forked", "__main__")
ANSWER_S = 20.0
"""For a fork by a server that has forked before; the first has its imports to wait for."""


class ForkServer:
    """Has *modules* imported for workers; without any there is none, and workers are spawned.

    Used in the event loop's thread only. A server that was killed, or does not answer any more and
    is killed, is started again for the next worker.
    """

    def __init__(self, modules: Sequence[str] = (), *, answer_s: float = ANSWER_S) -> None:
        self._modules = tuple(modules)
        self._answer_s = answer_s
        self._has_answered = False

    def start(
        self, make: Callable[[Context], _Made], then: Callable[[_Made | Exception], None]
    ) -> None:
        """Have *make* start a process, and call *then* with what it returned or raised.

        Where there is a server, *make* runs in a thread: until the server has imported everything
        it has to wait, and that must not hold up the loop, in which *then* is called.

        Raises:
            RuntimeError: no thread can be started.
        """
        if not self._modules:
            then(_try(make, _SPAWN))
            return
        loop = asyncio.get_running_loop()

        def work() -> None:
            made = self._fork(make)
            # The loop may have closed: nobody is left who would use the process, and it leaves
            # when its pipe closes with this one.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(then, made)

        threading.Thread(target=work, name="fork server", daemon=True).start()

    def kill(self) -> None:
        """Kill the server, if there is one: it hangs, or no worker will be started any more."""
        # The next one has its imports before it.
        self._has_answered = False
        pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        if self._modules and pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _fork(self, make: Callable[[Context], _Made]) -> _Made | Exception:
        # torch then asks NVML whether there is a card: CUDA cannot be used in a process whose
        # parent has initialised it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        _FORK.set_forkserver_preload([*_FIRST, *self._modules])
        watch = threading.Timer(self._answer_s, self.kill) if self._has_answered else None
        try:
            if watch is not None:
                watch.daemon = True
                watch.start()
            made = _try(make, _FORK)
        finally:
            if watch is not None:
                watch.cancel()
        if not isinstance(made, Exception):
            self._has_answered = True
            return made
        _log.warning("The worker takes longer to start, since it could not be forked: %r.", made)
        return _try(make, _SPAWN)


def _try(make: Callable[[Context], _Made], context: Context) -> _Made | Exception:
    try:
        return make(context)
    except Exception as error:
        return error
