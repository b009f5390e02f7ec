"""The report of `klein doctor`: lines, and problems with remedies, as text or JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Problem:
    """An error (*is_fatal*: the service cannot serve what its settings name) or a warning."""

    what: str
    remedy: str
    is_fatal: bool


@dataclass(slots=True)
class Report:
    """Collects lines and problems; *data* is merged into the JSON document."""

    data: dict[str, Any]
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    computed_for: str | None = None

    @property
    def can_serve(self) -> bool:
        """Whether there is no error, only warnings at most."""
        return not any(problem.is_fatal for problem in self.problems)

    def tell(self, subject: str, text: str) -> None:
        """Add a line of *text* under *subject*."""
        self.lines.append((subject, text))

    def complain(self, what: str, remedy: str, *, is_fatal: bool) -> None:
        """Add an error or, where not *is_fatal*, a warning."""
        self.problems.append(Problem(what, remedy, is_fatal))

    def as_json(self) -> dict[str, Any]:
        """Return the report as the JSON document for scripts."""
        return {
            "can_serve": self.can_serve,
            "computed_for": self.computed_for,
            "problems": [asdict(problem) for problem in self.problems],
            "told": [{"subject": subject, "text": text} for subject, text in self.lines],
            **self.data,
        }

    def render(self) -> str:
        """Return the report as text, errors before warnings."""
        lines = [_wrap(f"{subject:<11}", text) for subject, text in self.lines]
        for problem in sorted(self.problems, key=lambda problem: not problem.is_fatal):
            lines += [
                "",
                _wrap("error      " if problem.is_fatal else "warning    ", problem.what),
                _wrap("   remedy  ", problem.remedy),
            ]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if self.computed_for is not None:
            answer = "could serve" if self.can_serve else "could not serve"
            return f"Computed, nothing was measured: {self.computed_for} {answer} it."
        if self.can_serve:
            return "It can serve."
        fatal = sum(problem.is_fatal for problem in self.problems)
        return f"{fatal} {'thing' if fatal == 1 else 'things'} must be fixed before it can serve."


def gigabytes(size: int) -> str:
    """Format bytes in GB of 1e9 bytes."""
    return f"{size / 1e9:.1f} GB"


def _wrap(head: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
