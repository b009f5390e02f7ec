"""The process that workers are forked from: it has imported what they need and touched no card.

A forked worker has its modules at once and shares their memory. It is `multiprocessing`'s fork
server, of which a process has one; where it cannot be had, workers are spawned.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext, SpawnContext

_log = logging.getLogger(__name__)

Context = SpawnContext | ForkServerContext
"""What starts a process."""

_SPAWN = multiprocessing.get_context("spawn")
_FORK = multiprocessing.get_context("forkserver")


class ForkServer:
    """Has *modules* imported for workers; without any there is none, and workers are spawned.

    Used in the event loop's thread only. A server that was killed is started again for the next
    worker.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = tuple(modules)

    def ask(self, then: Callable[[Context], None]) -> None:
        """Call *then* with what starts a worker, once it does so without holding up the loop.

        Raises:
            RuntimeError: no thread can be started.
        """
        if not self._modules:
            then(_SPAWN)
            return
        loop = asyncio.get_running_loop()

        def wait() -> None:
            context = self._wait()
            # The loop may have closed: then there is no worker to start.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(then, context)

        threading.Thread(target=wait, name="fork server", daemon=True).start()

    def _wait(self) -> Context:
        """Return once the server has imported everything: once it has forked a process."""
        try:
            # torch then asks NVML whether there is a card: CUDA cannot be used in a process whose
            # parent has initialised it.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            _FORK.set_forkserver_preload(["__main__", "app.worker.forked", *self._modules])
            process = _FORK.Process(name="klein fork server's trial")
            process.start()
            process.join()
            process.close()
        except Exception as error:
            _log.warning("Workers take longer to start, since they cannot be forked: %r.", error)
            return _SPAWN
        return _FORK
