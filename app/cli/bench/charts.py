"""Two charts as SVG, which GitHub renders beside a report: stacked bars, lines over time.

The colours can be told apart on light and dark pages, and are not needed to read the numbers: the
report's tables have them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH = 720
_LEFT = 190
_RIGHT = 70
_COLOURS = ("#4477aa", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#66ccee")
_GREY = "#808080"


def stage_bars(bars: Mapping[str, Mapping[str, float]]) -> str:
    """Draw one stacked bar per row from seconds by stage; a stage has one colour in all bars."""
    stages = list(dict.fromkeys(stage for parts in bars.values() for stage in parts))
    longest = max((sum(parts.values()) for parts in bars.values()), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    lines = []
    for row, (name, parts) in enumerate(bars.items()):
        top, x = 12 + 28 * row, float(_LEFT)
        lines.append(_text(_LEFT - 8, top + 14, name, anchor="end"))
        for stage, seconds in parts.items():
            colour, width = _COLOURS[stages.index(stage) % len(_COLOURS)], seconds * scale
            title = f"<title>{escape(stage)} {seconds:.3f} s</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="20" fill="{colour}">'
                f"{title}</rect>"
            )
            x += width
        lines.append(_text(x + 6, top + 14, f"{sum(parts.values()):.3f} s"))
    bottom = 12 + 28 * len(bars) + 16
    return _svg(bottom + 12, [*lines, *_legend(stages, bottom)])


def lines_over_time(
    curves: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[str, float], *, unit: str
) -> str:
    """Draw curves of (seconds, value) from zero up; *marks* are labelled horizontal lines."""
    points = [point for curve in curves.values() for point in curve]
    last = max((at for at, _ in points), default=0.0) or 1.0
    most = max([value for _, value in points] + list(marks.values()), default=0.0) or 1.0
    height, top, left = 220, 12, 70
    width = _WIDTH - left - _RIGHT

    def place(at: float, value: float) -> tuple[float, float]:
        return left + width * at / last, top + height * (1 - value / most)

    lines = [_rule(left, top + height, left + width, top + height)]
    for share in (0.25, 0.5, 0.75, 1.0):
        _, y = place(0.0, most * share)
        lines.append(_text(left - 6, y + 4, f"{most * share:.1f} {unit}", anchor="end"))
    for name, value in marks.items():
        _, y = place(0.0, value)
        lines.append(_rule(left, y, left + width, y, dashed=True))
        lines.append(_text(left + width, y - 4, name, anchor="end"))
    for number, curve in enumerate(curves.values()):
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        colour = _COLOURS[number % len(_COLOURS)]
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    lines.append(_text(left + width, top + height + 16, f"{last:.0f} s", anchor="end"))
    return _svg(top + height + 52, [*lines, *_legend(list(curves), top + height + 40)])


def _legend(names: Sequence[str], y: float) -> list[str]:
    lines, x = [], 12.0
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        lines.append(f'<rect x="{x:.1f}" y="{y - 10}" width="10" height="10" fill="{colour}"/>')
        lines.append(_text(x + 15, y, name))
        x += 32 + 7.5 * len(name)
    return lines


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_GREY}"{dashes}/>'
    )


def _svg(height: float, lines: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" height="{height:.0f}" font-family="sans-serif" font-size="13" '
        f'fill="{_GREY}">\n' + "\n".join(lines) + "\n</svg>\n"
    )
