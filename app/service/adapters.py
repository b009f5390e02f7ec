"""The adapters that requests may name: those of the directory that fit the model.

Used on the event loop's thread only. What is listed is replaced as a whole when the directory has
changed; a `Lora` that a job holds stays what it was, since it names the file by its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from app.domain import Lora

_MAX_NEAR = 3


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be used now."""

    name: str
    """Made from the file's name; what requests name it by."""
    sha256: str
    size_bytes: int
    rank: int
    """As `Lora.rank`."""
    created: int
    """When its file was changed, in seconds since 1970."""
    preview: bool
    """Whether a picture lies beside the file."""
    path: str = field(repr=False)
    """Never shown to a client."""


class UnknownAdapter(KeyError):
    """No adapter has this name; `Adapters.near` knows names like it."""


class Adapters:
    """What is listed now; *wanted* are the names and scales of `KLEIN_LORAS`."""

    def __init__(self, wanted: Sequence[tuple[str, float]] = (), max_rank: int = 128) -> None:
        self.max_rank = max_rank
        """The most that the ranks of one image's adapters may sum up to."""
        self.default: tuple[Lora, ...] = ()
        """The adapters of an image whose request names none."""
        self.problems: tuple[str, ...] = ()
        """Why adapters of `KLEIN_LORAS` are not used, in sentences."""
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
        return tuple(get_close_matches(name, self._listed, n=_MAX_NEAR))

    def use(self, name: str, scale: float) -> Lora:
        """Return the adapter *name*, as its file is now, to be used at *scale*.

        Raises:
            UnknownAdapter: there is none.
        """
        found = self.find(name)
        if found is None:
            raise UnknownAdapter(name)
        return Lora(found.name, scale, found.sha256, found.path, found.rank)

    def replace(self, found: Sequence[Adapter]) -> None:
        """List *found* instead of what was listed before."""
        self._listed = {each.name: each for each in sorted(found, key=lambda each: each.name)}
        self._choose_default()

    def _choose_default(self) -> None:
        problems = [
            f"KLEIN_LORAS names {name}, but no adapter of this name is listed."
            for name, _ in self._wanted
            if name not in self._listed
        ]
        self.default = tuple(
            self.use(name, scale) for name, scale in self._wanted if name in self._listed
        )
        self.problems = tuple(problems)
