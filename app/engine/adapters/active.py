"""Which adapters are at work: read, kept in host memory, and copied to where the layers read them.

Not thread-safe: the engine's thread alone uses it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app.domain import Lora, LoraLoad
from app.engine.adapters.branches import (
    ExactBranch,
    Place,
    Prepared,
    SlotBranch,
    prepare_exact,
    prepare_slots,
)
from app.engine.adapters.layout import AdapterRefused, Shapes
from app.engine.adapters.names import targets_of
from app.engine.adapters.reader import Branch, LowRank, read_adapter
from app.errors import GenerationFailed, StartupError

_log = logging.getLogger(__name__)

_HOST_BYTES = 1_000_000_000
"""What adapters that no job uses may take in host memory."""

_TRIAL = Lora("trial", 1.0, "trial", "")

_Adapter = Mapping[tuple[str, ...], Prepared]
"""What an adapter adds to each layer, by the modules that the layer joins."""


class ActiveAdapters:
    """The adapters of one transformer; *places* are its layers, *shapes* those of diffusers'.

    *set_variant* is told what the transformer's graphs depend on: `()` without adapters, None
    where they cannot run as a graph.
    """

    def __init__(
        self,
        places: Iterable[Place],
        shapes: Shapes,
        device: torch.device,
        dtype: torch.dtype,
        set_variant: Callable[[Hashable | None], None],
        *,
        is_exact: bool,
    ) -> None:
        self.shapes = dict(shapes)
        self._places = {place.modules: place for place in places}
        self._device, self._dtype = device, dtype
        self._set_variant = set_variant
        self._prepare = prepare_exact if is_exact else prepare_slots
        self._kind = ExactBranch if is_exact else SlotBranch
        self._branches: dict[tuple[str, ...], ExactBranch | SlotBranch] = {}
        self._kept: OrderedDict[str, _Adapter] = OrderedDict()
        self._chosen: tuple[tuple[str, float], ...] = ()

    @property
    def size_bytes(self) -> int:
        """What adapters take on the device."""
        return sum(branch.size_bytes for branch in self._branches.values())

    def select(self, loras: Iterable[Lora]) -> tuple[LoraLoad, ...]:
        """Have the layers add *loras* from now on, but those of scale 0, and no others.

        Return what had to be brought; nothing, where the last job had the same.

        Raises:
            GenerationFailed: the file of one was replaced or cannot be used any more.
        """
        wanted = [lora for lora in loras if lora.scale]
        chosen = tuple((lora.sha256, lora.scale) for lora in wanted)
        if chosen == self._chosen:
            return ()
        self._clear()
        loads: list[LoraLoad] = []
        adapters: list[tuple[_Adapter, float]] = []
        try:
            for lora in wanted:
                begun = time.perf_counter()
                source = "host" if lora.sha256 in self._kept else "disk"
                adapters.append((self._take(lora), lora.scale))
                loads.append(LoraLoad(lora.name, time.perf_counter() - begun, source))
            begun = time.perf_counter()
            self._fill(adapters)
        except BaseException:
            self._clear()
            raise
        finally:
            self._forget({lora.sha256 for lora in wanted})
        share = (time.perf_counter() - begun) / max(1, len(loads))
        self._chosen = chosen
        return tuple(LoraLoad(each.name, each.seconds + share, each.source) for each in loads)

    def give_up(self) -> None:
        """Free what adapters take on the device; the next job that has some brings them anew."""
        self._clear()
        for branch in self._branches.values():
            branch.drop()

    @contextmanager
    def trial(self) -> Iterator[tuple[Lora, ...]]:
        """Yield an adapter of zeros on one block of each kind, for a picture of the warm-up.

        It has every kernel compiled that an adapter needs, so that none is when one is first used.
        """
        blocks = tuple(place for name, place in self._places.items() if ".0." in name[0][:30])
        self._kept[_TRIAL.sha256] = {
            place.modules: prepared
            for place in blocks
            if (prepared := self._prepared(self._zeros(place.modules), place.modules))
        }
        try:
            yield (_TRIAL,)
        finally:
            self._clear()
            del self._kept[_TRIAL.sha256]
            for place in blocks:
                self._branches.pop(place.modules, None)

    def _zeros(self, modules: tuple[str, ...]) -> dict[str, Branch]:
        down = torch.zeros(1, self.shapes[modules[0]][1])
        return {name: LowRank(down, torch.zeros(self.shapes[name][0], 1), 1.0) for name in modules}

    def _clear(self) -> None:
        """Have no layer add anything."""
        for modules, branch in self._branches.items():
            self._places[modules].layer.__dict__["branch"] = None
            branch.clear()
        self._set_variant(())
        self._chosen = ()

    def _fill(self, adapters: list[tuple[_Adapter, float]]) -> None:
        touched = {modules for adapter, _ in adapters for modules in adapter}
        self._make_room([adapter for adapter, _ in adapters], touched)
        variant: list[Hashable] = []
        is_graph = True
        # In the order of the layers, so that equal adapters make equal variants.
        for modules, place in self._places.items():
            if modules not in touched:
                variant.append(0)
                continue
            branch = self._branch(place)
            branch.fill(
                [(adapter[modules], scale) for adapter, scale in adapters if modules in adapter]
            )
            place.layer.__dict__["branch"] = branch
            variant.append(branch.variant)
            is_graph = is_graph and branch.variant is not None
        if touched:
            self._set_variant(tuple(variant) if is_graph else None)

    def _make_room(self, adapters: list[_Adapter], touched: set[tuple[str, ...]]) -> None:
        """Drop slots that must grow, all before one does: the allocator keeps pieces else."""
        has_grown = False
        for modules in touched & self._branches.keys():
            parts = [adapter[modules] for adapter in adapters if modules in adapter]
            rank = sum(len(part.down) for part in parts if part.down is not None)
            has_grown |= self._branches[modules].make_room(rank)
        if has_grown and self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _branch(self, place: Place) -> ExactBranch | SlotBranch:
        branch = self._branches.get(place.modules)
        if branch is None:
            outputs = sum(self.shapes[name][0] for name in place.modules)
            branch = self._branches[place.modules] = self._kind(place, outputs, self._device)
            if place.is_hooked and "branch" not in place.layer.__dict__:
                place.layer.register_forward_hook(_add_branch)
        return branch

    def _take(self, lora: Lora) -> _Adapter:
        """Return the adapter from host memory, where it is read into if it is not there."""
        if lora.sha256 not in self._kept:
            branches = self._read(lora)
            self._kept[lora.sha256] = {
                modules: prepared.pinned() if self._device.type == "cuda" else prepared
                for modules in self._places
                if (prepared := self._prepared(branches, modules))
            }
        self._kept.move_to_end(lora.sha256)
        return self._kept[lora.sha256]

    def _prepared(
        self, branches: Mapping[str, Branch], modules: tuple[str, ...]
    ) -> Prepared | None:
        outputs = [self.shapes[name][0] for name in modules]
        return self._prepare(branches, modules, outputs, self._dtype)

    def _read(self, lora: Lora) -> dict[str, Branch]:
        try:
            return read_whole(lora, self.shapes)
        except (AdapterRefused, StartupError) as error:
            _log.warning("The adapter %s cannot be used: %s", lora.name, error)
            why = getattr(error, "why", "")
        except OSError as error:
            # Its text has the path.
            _log.warning("The adapter %s cannot be read (%s).", lora.name, error.strerror)
            why = ""
        if why:
            raise GenerationFailed(f"The adapter {lora.name} cannot be used: {why}.")
        raise GenerationFailed(
            f"The adapter {lora.name} was replaced or cannot be read any more; ask again."
        )

    def _forget(self, used: set[str]) -> None:
        """Drop the adapters that were used the longest ago, as the limit asks, but those *used*."""
        size = {
            sha256: sum(t.nbytes for part in adapter.values() for t in part.tensors())
            for sha256, adapter in self._kept.items()
            if sha256 not in used
        }
        total = sum(size.values())
        for sha256, size_bytes in size.items():
            if total <= _HOST_BYTES:
                return
            del self._kept[sha256]
            total -= size_bytes


def read_whole(lora: Lora, shapes: Shapes) -> dict[str, Branch]:
    """Read the branches of the file of *lora*, whose content must be what it names.

    Raises:
        AdapterRefused: it is not, or it does not fit *shapes*.
        OSError: it cannot be read.
    """
    path = Path(lora.path)
    # A pipe in its place would not answer.
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with ThreadPoolExecutor(1, "hash") as pool:
        digest = pool.submit(_sha256, path)
        refused = None
        try:
            branches = read_adapter(path, targets_of(shapes), shapes)
        except AdapterRefused as error:
            refused = error
        # Before what is wrong with the file is said: that may be true of another one alone.
        if digest.result() != lora.sha256:
            raise AdapterRefused(f"{path.name} is not what it was when it was listed.")
        if refused is not None:
            raise refused
    return branches


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add_branch(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    branch = module.__dict__.get("branch")
    return output if branch is None else branch.add(output, inputs[0])
