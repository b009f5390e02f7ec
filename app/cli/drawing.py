"""What happens while pictures are made, and how a terminal shows it; the same for both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from app.cli.console import Progress
from app.cli.preview import Previews


@dataclass(frozen=True, slots=True)
class Step:
    """A picture is at *text*, and *share* of it is done."""

    text: str
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Preview:
    """What a picture looks like so far, as a file."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished picture, as a file."""

    data: bytes = field(repr=False)
    width: int
    height: int
    seed: int
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()


Event = Step | Preview | Drawn
OnEvent = Callable[[int, Event], None]
"""Is told what happens to the picture of an index; the last event of each is `Drawn`."""


def denoised(step: int, steps: int) -> float:
    """Return how much of a picture is done after so many steps; the decode is a step too."""
    return step / (steps + 1)


class Display:
    """Shows the events of several pictures: one line for all, previews of the first not done."""

    def __init__(self, count: int, progress: Progress, previews: Previews | None) -> None:
        self._progress = progress
        self._previews = previews
        self._shares = [0.0] * count
        self._texts = [""] * count
        self._done: set[int] = set()

    def on(self, index: int, event: Event) -> None:
        """Show *event*."""
        if isinstance(event, Step):
            self._shares[index], self._texts[index] = event.share, event.text
        elif isinstance(event, Preview):
            if index == self._first():
                self._show(event.data)
        else:
            self._shares[index] = 1.0
            self._done.add(index)
            self._show(event.data)
            if self._previews is not None:
                self._progress.clear()
                self._previews.leave()
        self._draw()

    def clear(self) -> None:
        """Remove the line, so that something can be printed."""
        self._progress.clear()

    def _show(self, data: bytes) -> None:
        if self._previews is not None:
            self._progress.clear()
            self._previews.show(data)

    def _first(self) -> int:
        """Return the first picture that is not done; the number of all where there is none."""
        return next((each for each in range(len(self._shares)) if each not in self._done), 0)

    def _draw(self) -> None:
        count = len(self._shares)
        doing = self._texts[self._first()]
        told = f"{len(self._done)} of {count}, {doing}" if count > 1 else doing
        self._progress(sum(self._shares) / count, told)
