"""What a race found, and the choice that follows: plain data and pure functions.

The parts of a step, its linear layers and its attention, are timed one by one, so the time of a
combination is their sum. Each part has an incumbent, which is taken without a race: the first of
the laps that is right and no challenger. Whoever takes its place must make the whole step 3 %
faster: races on three H100s differed by at most 1 % in each part, and an incumbent is the one that
has been used longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from app.engine.quantization.formats import AUTO

MARGIN = 1.03
"""How many times faster the step must become for each part that is exchanged."""


@dataclass(frozen=True, slots=True)
class Lap:
    """What one weight format or attention kernel showed."""

    name: str
    seconds: float | None = None
    """Of its part in one step at the default size; None where it does not run.

    Of a layer of the text encoder: of one call."""
    error: float | None = None
    """Relative, with heavy-tailed inputs; None where it was not measured."""
    bound: float = 1.0
    """The largest *error* at which it is admitted."""
    fault: str = ""
    """Why it does not run here; empty where it does."""
    is_challenger: bool = False
    """Whether it is never an incumbent: it is taken for its time only."""
    must_win: bool = False
    """Whether it must be faster than the reference."""
    is_reference: bool = False
    """Whether it is timed for comparison only, as bf16 is."""


@dataclass(frozen=True, slots=True)
class Results:
    """A race on a card: the laps of each part, those preferred first."""

    capability: tuple[int, int]
    linears: tuple[Lap, ...]
    attention: tuple[Lap, ...]
    disturbed: str = ""
    """What else used the card, so that the times decide nothing; empty where nothing was seen."""
    is_computed: bool = False
    """Whether the times come from a datasheet."""

    @property
    def milliseconds(self) -> dict[str, dict[str, float]]:
        """The times by part and name, rounded, for people and scripts."""
        return {
            part: {lap.name: round(1e3 * lap.seconds, 2) for lap in laps if lap.seconds}
            for part, laps in (("linears", self.linears), ("attention", self.attention))
        }


@dataclass(frozen=True, slots=True)
class Winner:
    """The choice; *linears* is empty where no 8-bit format is admitted, and *reason* says why."""

    linears: str
    attention: str
    reason: str


def choose(results: Results, linears: str = AUTO, attention: str = AUTO) -> Winner:
    """Choose the fastest combination; a part that the operator names stays as named.

    *linears* and *attention* are values of `KLEIN_PRECISION` and `KLEIN_ATTENTION`.
    """
    is_timed = not results.disturbed
    formats = _entrants(results.linears, linears, is_timed=is_timed)
    kernels = _entrants(results.attention, attention, is_timed=is_timed)
    if results.disturbed:
        formats, kernels = formats[:1], kernels[:1]
    # Each exchange of an incumbent, which stands first, has to be worth its margin.
    pairs = product(enumerate(formats or [Lap("")]), enumerate(kernels or [Lap("")]))
    best = min(pairs, key=_handicapped)
    (format_place, taken), (kernel_place, kernel) = best
    is_kept = not format_place and not kernel_place
    return Winner(taken.name, kernel.name, _reason(results, is_kept=is_kept))


def wrong(lap: Lap) -> str:
    """Return why *lap* could not even be taken by name: it does not run, or its error is large."""
    return _fault(lap, None)


def faults(laps: tuple[Lap, ...], *, is_timed: bool = True) -> dict[str, str]:
    """Return why laps are not admitted, by name; *is_timed*: whether their seconds count."""
    plain_s = next((lap.seconds for lap in laps if lap.is_reference and is_timed), None)
    found = {lap.name: _fault(lap, plain_s) for lap in laps if not lap.is_reference}
    return {name: why for name, why in found.items() if why}


def settle(run: Callable[[], Results], wait: Callable[[], None]) -> Results:
    """Hold a race by *run*; one that was disturbed is repeated once, after *wait*."""
    results = run()
    if results.disturbed:
        wait()
        results = run()
    return results


def _entrants(laps: tuple[Lap, ...], named: str, *, is_timed: bool) -> list[Lap]:
    """Return the admitted laps, the incumbent first, or the one that is *named*."""
    if named != AUTO:
        return [lap for lap in laps if lap.name == named] or [Lap(named)]
    left_out = faults(laps, is_timed=is_timed)
    admitted = [lap for lap in laps if not lap.is_reference and lap.name not in left_out]
    return sorted(admitted, key=lambda lap: lap.is_challenger)


def _fault(lap: Lap, plain_s: float | None) -> str:
    if lap.fault:
        return lap.fault
    if lap.error is not None and not lap.error <= lap.bound:  # NaN too
        return f"its error of {lap.error:.1%} is more than {lap.bound:.0%}"
    if lap.must_win and plain_s and lap.seconds and lap.seconds >= plain_s:
        return f"{lap.seconds / plain_s:.2f} times bf16's time on this card"
    return ""


def _handicapped(pair: tuple[tuple[int, Lap], tuple[int, Lap]]) -> float:
    """Return a combination's seconds, times the margin for each part that is no incumbent."""
    seconds = sum(lap.seconds or 0.0 for _, lap in pair)
    return seconds * float(MARGIN ** sum(place > 0 for place, _ in pair))


def _reason(results: Results, *, is_kept: bool) -> str:
    if results.disturbed:
        why = f"chosen without the times, since the card was disturbed twice: {results.disturbed}"
    elif is_kept:
        why = f"nothing else makes a step {100 * (MARGIN - 1):.0f} % faster"
    else:
        why = "the fastest that keeps its bound"
    return "; ".join([why, *_told(results)])


def _told(results: Results) -> Iterator[str]:
    how = "computed from the datasheet" if results.is_computed else "timed here"
    times = (
        ("" if part == "linears" else f"{part} ")
        + ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(laps.items(), key=lambda x: x[1]))
        for part, laps in results.milliseconds.items()
    )
    yield f"{how}, ms a step: {'; '.join(times)}"
    for laps in (results.linears, results.attention):
        left_out = faults(laps, is_timed=not results.disturbed)
        yield from (f"{name} left out: {why}" for name, why in left_out.items())
