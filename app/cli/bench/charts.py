"""Two charts as SVG, which GitHub renders beside a report: stacked bars, lines over time.

The colours can be told apart on light and dark pages, and are not needed to read the numbers: the
report's tables have them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from xml.sax.saxutils import escape

_WIDTH = 720
_RIGHT = 70
_COLOURS = ("#4477aa", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#66ccee")
_GREY = "#808080"


def stage_bars(bars: Mapping[str, Mapping[str, float]]) -> str:
    """Draw one stacked bar per row from seconds by stage; a stage has one colour in all bars."""
    left = 190
    colours = _colours(stage for parts in bars.values() for stage in parts)
    longest = max((sum(parts.values()) for parts in bars.values()), default=0.0) or 1.0
    lines = []
    for row, (name, parts) in enumerate(bars.items()):
        top, x = 12 + 28 * row, float(left)
        lines.append(_text(left - 8, top + 14, name, anchor="end"))
        for stage, seconds in parts.items():
            width = seconds * (_WIDTH - left - _RIGHT) / longest
            lines.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="20" '
                f'fill="{colours[stage]}"><title>{escape(stage)} {seconds:.3f} s</title></rect>'
            )
            x += width
        lines.append(_text(x + 6, top + 14, f"{sum(parts.values()):.3f} s"))
    return _svg(lines, colours, bottom=12 + 28 * len(bars) + 16)


def lines_over_time(
    curves: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[str, float], *, unit: str
) -> str:
    """Draw curves of (seconds, value) from zero up; *marks* are labelled horizontal lines."""
    points = [point for curve in curves.values() for point in curve]
    last = max((at for at, _ in points), default=0.0) or 1.0
    most = max([value for _, value in points] + list(marks.values()), default=0.0) or 1.0
    left, right, bottom, height = 70, _WIDTH - _RIGHT, 232, 220

    def y_of(value: float) -> float:
        return bottom - height * value / most

    lines = [
        _rule(left, right, bottom),
        _text(right, bottom + 16, f"{last:.0f} s", anchor="end"),
        *(
            _text(left - 6, y_of(most * share) + 4, f"{most * share:.1f} {unit}", anchor="end")
            for share in (0.25, 0.5, 0.75, 1.0)
        ),
    ]
    for name, value in marks.items():
        lines += [
            _rule(left, right, y_of(value), style=' stroke-dasharray="4 4"'),
            _text(right, y_of(value) - 4, name, anchor="end"),
        ]
    colours = _colours(curves)
    for name, curve in curves.items():
        path = " ".join(
            f"{left + (right - left) * at / last:.1f},{y_of(value):.1f}" for at, value in curve
        )
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        )
    return _svg(lines, colours, bottom=bottom + 40)


def _colours(names: Iterable[str]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(names), cycle(_COLOURS), strict=False))


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, x2: float, y: float, *, style: str = "") -> str:
    return f'<line x1="{x1}" y1="{y:.1f}" x2="{x2}" y2="{y:.1f}" stroke="{_GREY}"{style}/>'


def _svg(lines: list[str], legend: Mapping[str, str], *, bottom: int) -> str:
    """Return the picture, with the colours of *legend* explained at *bottom*."""
    x = 12.0
    for name, colour in legend.items():
        lines += [
            f'<rect x="{x:.1f}" y="{bottom - 10}" width="10" height="10" fill="{colour}"/>',
            _text(x + 15, bottom, name),
        ]
        x += 32 + 7.5 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 12}" '
        f'width="{_WIDTH}" height="{bottom + 12}" font-family="sans-serif" font-size="13" '
        f'fill="{_GREY}">\n' + "\n".join(lines) + "\n</svg>\n"
    )
