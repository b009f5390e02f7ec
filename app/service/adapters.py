"""The adapters that requests may name: those of the directory that fit the model.

What is listed is replaced as a whole when the directory has changed; a `Lora` that a job holds
stays what it was, since it names the file by its hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches
from heapq import nlargest
from threading import Event, Thread

from app.domain import Lora, ModelInfo
from app.engine.adapters.directory import MAX_NAME, Directory, Listing, RefusedFile
from app.engine.adapters.directory import Adapter as Adapter
from app.engine.adapters.layout import Shapes

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 3.0
_MAX_NEAR = 3
_MAX_COMPARED = 16
_MAX_TOLD = 10
"""Files at a time that the log says of why they are not listed."""


class UnknownAdapter(KeyError):
    """No adapter has this name; `Adapters.near` knows names like it."""


class Adapters:
    """What is listed now, for the event loop's thread only.

    *wanted* are the names and scales of KLEIN_LORAS, *fused* what KLEIN_LORA_FUSE has become.
    """

    def __init__(
        self,
        wanted: Sequence[tuple[str, float]] = (),
        max_rank: int = 128,
        fused: tuple[Lora, ...] = (),
    ) -> None:
        self.max_rank = max_rank
        """The most that the ranks of one image's adapters may sum up to."""
        self.fused = fused
        """The adapters that are part of the weights."""
        self.default: tuple[Lora, ...] = ()
        """The adapters of an image whose request names none."""
        self.is_whole = asyncio.Event()
        """Set while every file of the directory has been looked at."""
        self.problems: tuple[str, ...] = ()
        """Why adapters of KLEIN_LORAS are not used, in sentences."""
        self.refused: tuple[RefusedFile, ...] = ()
        """The files that are not listed."""
        self._wanted = tuple(wanted)
        self._listed: dict[str, Adapter] = {}

    def listed(self) -> tuple[Adapter, ...]:
        """Return the adapters by name; none until the model is loaded."""
        return tuple(self._listed.values())

    def find(self, name: str) -> Adapter | None:
        """Return the adapter *name*."""
        return self._listed.get(name)

    def near(self, name: str) -> tuple[str, ...]:
        """Return at most three names like *name*, the most like it first."""
        # All of difflib's work for a thousand long names would hold up the event loop.
        matcher = SequenceMatcher(b=name[:MAX_NAME])
        ratios = []
        for each in self._listed:
            matcher.set_seq1(each)
            ratios.append((matcher.quick_ratio(), each))
        likely = [each for _, each in nlargest(_MAX_COMPARED, ratios)]
        return tuple(get_close_matches(name[:MAX_NAME], likely, _MAX_NEAR))

    def use(self, name: str, scale: float) -> Lora:
        """Return the adapter *name*, as its file is now, to be used at *scale*.

        Raises:
            UnknownAdapter: there is none.
        """
        found = self.find(name)
        if found is None:
            raise UnknownAdapter(name)
        return Lora(found.name, scale, found.sha256, found.path, found.rank)

    def default_scale(self, name: str) -> float | None:
        """Return the scale of *name* among the adapters of an image whose request names none."""
        return next((lora.scale for lora in self.default if lora.name == name), None)

    def replace(self, found: Listing) -> None:
        """List *found* instead of what was listed before, and log what is new of it."""
        told = set(self.refused)
        new = [each for each in found.refused if each not in told]
        for each in new[:_MAX_TOLD]:
            _log.warning("An adapter's file is not listed: %s", each.reason)
        if len(new) > _MAX_TOLD:
            _log.warning("%d more are not; `klein lora list` says why.", len(new) - _MAX_TOLD)
        self.refused = found.refused
        (self.is_whole.set if found.is_whole else self.is_whole.clear)()
        names = set(self._listed)
        self._listed = {each.name: each for each in found.adapters}
        if names != set(self._listed):
            _log.info("Adapters that are listed: %d.", len(self._listed))
        self.default = tuple(self.use(*each) for each in self._wanted if each[0] in self._listed)
        problems = self._find_problems(is_whole=found.is_whole)
        for sentence in problems:
            if sentence not in self.problems:
                _log.error(sentence)
        self.problems = problems

    def _find_problems(self, *, is_whole: bool) -> tuple[str, ...]:
        rank = sum(lora.rank for lora in self.default)
        if rank > self.max_rank:
            self.default = ()
            return (
                f"The adapters of KLEIN_LORAS have rank {rank} together, above the "
                f"{self.max_rank} of KLEIN_LORA_RANK; none of them is used.",
            )
        missing = (
            f"KLEIN_LORAS names {name}, but no such adapter is listed; images are made without it."
            for name, _ in self._wanted
            if name not in self._listed
        )
        # Those that are still to be read may be among what is missing, but not a second time.
        return tuple(each for each in missing if is_whole or each in self.problems)


class AdapterWatch:
    """Looks at a directory every few seconds, in a thread, and lists what is there.

    The thread is a daemon: a file system that does not answer holds up nothing, not even the end.
    """

    def __init__(
        self,
        directory: Directory,
        adapters: Adapters,
        first: Sequence[str] = (),
        *,
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._directory = directory
        self._adapters = adapters
        self._first = tuple(first)
        self._every_s = every_s
        self._is_closed = False
        self._told: Listing | None = None
        self._shapes: Shapes = {}
        self._wake = Event()

    def start(self) -> None:
        """Start the thread; nothing is listed before `on_ready`."""
        loop = asyncio.get_running_loop()
        Thread(target=self._run, args=(loop,), name="adapters", daemon=True).start()

    def on_ready(self, info: ModelInfo) -> None:
        """List the adapters of the model that has been loaded from now on."""
        self._shapes = info.linear_shapes
        self._wake.set()

    def close(self) -> None:
        """Have the thread end; it is not waited for."""
        self._is_closed = True
        self._directory.stop()
        self._wake.set()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._first:
            self._directory.hash_first(self._first)
        self._wake.wait()
        while not self._is_closed:
            self._wake.clear()
            try:
                self._look(loop)
            except Exception:
                # Whatever is found in the folder, the next look may go better.
                _log.warning("The folder of adapters could not be read.", exc_info=True)
            self._wake.wait(self._every_s)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._shapes:
            return
        for found in self._directory.look(self._shapes, self._first):
            if found != self._told and not self._is_closed:
                self._told = found
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._adapters.replace, found)
