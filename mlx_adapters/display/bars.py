"""The report's pictures as charts to draw: horizontal, with labels above the bars, so that a phone can show them.

Text is gray and bars are mid-tones, readable on light and dark pages; a page may set its own with CSS.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from mlx_adapters.display.layout import COLORS, INK, Box, Chart, Dot, Label, Mark, Rule, ticks
from mlx_adapters.units import number

WIDTH, MARGIN, ROW, AXIS = 400, 14, 44, 46
Format = Callable[[float], str]


def _chart(height: float, marks: Sequence[Mark], title: str) -> Chart:
    return Chart(title, WIDTH, round(height), marks)


def _text(x: float, y: float, text: str, anchor: str = "start", bold: bool = False) -> Label:
    return Label((round(x, 1), round(y, 1)), text, anchor, bold=bold)


def _dot(x: float, y: float, radius: float, color: str, opacity: float = 1) -> Dot:
    return Dot((round(x, 1), round(y, 1)), radius, color, opacity)


def _rule(
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = INK,
    width: float = 1,
    opacity: float = 1,
    rounded: bool = False,
) -> Rule:
    (x, y), (x2, y2) = start, end
    return Rule((round(x, 1), round(y, 1)), (round(x2, 1), round(y2, 1)), color, width, opacity, rounded)


def shorten(text: str, length: int = 44) -> str:
    """A label that fits: the end of a path says more than its beginning."""
    return text if len(text) <= length else "…" + text[1 - length :]


class _Scale:
    """From values to pixels, with round ticks that include both ends of the data."""

    def __init__(self, low: float, high: float, zero: bool = True) -> None:
        self.ticks = ticks(min(low, 0.0) if zero else low, high, 4)
        self.low, self.span = self.ticks[0], (self.ticks[-1] - self.ticks[0]) or 1.0

    def __call__(self, value: float) -> float:
        return MARGIN + (value - self.low) / self.span * (WIDTH - 2 * MARGIN)

    def axis(self, top: float, bottom: float, label: str, show: Format) -> list[Mark]:
        parts: list[Mark] = []
        for value in self.ticks:
            x, last = self(value), value == self.ticks[-1]
            parts.append(_rule((x, top), (x, bottom), opacity=0.25))
            anchor = "end" if last else "start" if value == self.ticks[0] else "middle"
            parts.append(_text(x, bottom + 16, show(value), anchor))
        return [*parts, _text(WIDTH / 2, bottom + 34, label, "middle")]


def strips(rows: Mapping[str, Sequence[float]], title: str, unit: str) -> Chart:
    """Every trial as a dot and the median as a bar from zero, one line for each variant."""
    scale = _Scale(0, max(max(values) for values in rows.values()))
    bottom = ROW * len(rows) + 4
    parts = scale.axis(4, bottom, unit, number)
    for i, (label, values) in enumerate(rows.items()):
        y, color, middle = ROW * i, COLORS[i % len(COLORS)], median(values)
        parts.append(_text(MARGIN, y + 15, shorten(label)))
        parts.append(_text(WIDTH - MARGIN, y + 15, number(middle), "end", bold=True))
        parts.append(_bar(scale(0), scale(middle), y + 21, color, 0.35))
        parts += [_dot(scale(v), y + 28, 3, color, 0.7) for v in values]
    return _chart(bottom + AXIS, parts, title)


def stacked(rows: Mapping[str, Mapping[str, float]], title: str, unit: str, show: Format) -> Chart:
    """One bar for each variant, made of named parts; parts of one name share a color."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    scale = _Scale(0, max(sum(parts.values()) for parts in rows.values()))
    legend, top = _legend(colors)
    bottom = top + ROW * len(rows) + 4
    out = [*legend, *scale.axis(top + 4, bottom, unit, show)]
    for i, (label, parts) in enumerate(rows.items()):
        y, start = top + ROW * i, 0.0
        out.append(_text(MARGIN, y + 15, shorten(label)))
        out.append(_text(WIDTH - MARGIN, y + 15, show(sum(parts.values())), "end", bold=True))
        for name, value in parts.items():
            out.append(_bar(scale(start), scale(start + value), y + 21, colors[name], 0.85))
            start += value
    return _chart(bottom + AXIS, out, title)


def grouped(rows: Mapping[str, Mapping[str, float]], title: str, unit: str, show: Format) -> Chart:
    """Several bars below each other for each variant, such as cold and warm load."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    scale = _Scale(0, max(max(parts.values()) for parts in rows.values()))
    legend, top = _legend(colors) if len(names) > 1 else ([], 0)
    height = 26 + 18 * len(names)
    bottom = top + height * len(rows) + 4
    out = [*legend, *scale.axis(top + 4, bottom, unit, show)]
    for i, (label, parts) in enumerate(rows.items()):
        y = top + height * i
        out.append(_text(MARGIN, y + 15, shorten(label)))
        out.append(_text(WIDTH - MARGIN, y + 15, " / ".join(show(v) for v in parts.values()), "end", bold=True))
        for j, (name, value) in enumerate(parts.items()):
            out.append(_bar(scale(0), scale(value), y + 21 + 18 * j, colors[name], 0.85))
    return _chart(bottom + AXIS, out, title)


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str, unit: str) -> Chart:
    """(label, low, value, high) as a dot on its interval; the line at zero means no difference."""
    low, high = min(row[1] for row in rows), max(row[3] for row in rows)
    scale = _Scale(min(low, 0), max(high, 0), zero=False)
    bottom = ROW * len(rows) + 4
    parts = scale.axis(4, bottom, unit, lambda v: f"{v:+g}" if v else "0")
    parts.append(_rule((scale(0), 4), (scale(0), bottom), width=1.5))
    for i, (label, start, value, end) in enumerate(rows):
        y, sure = ROW * i, start > 0 or end < 0
        color = COLORS[0] if sure else INK
        words = f"{value:+.1f} [{start:+.1f}, {end:+.1f}]"
        parts.append(_text(MARGIN, y + 15, shorten(label, 56 - len(words))))
        parts.append(_text(WIDTH - MARGIN, y + 15, words, "end", bold=sure))
        parts.append(_rule((scale(start), y + 28), (scale(end), y + 28), color, 3, 0.6, rounded=True))
        parts.append(_dot(scale(value), y + 28, 5, color))
    return _chart(bottom + AXIS, parts, title)


def scatter(points: Mapping[str, tuple[float, float, float]], title: str, x_unit: str, y_unit: str) -> Chart:
    """(x, y, standard error of y) of each variant, with a legend below."""
    height = 230
    scale = _Scale(0, max(x for x, _, _ in points.values()))
    lowest = min(y for _, y, _ in points.values())
    levels = ticks(min(0.0, lowest), max(y + 2 * e for _, y, e in points.values()), 4)

    def up(value: float) -> float:
        return height - (value - levels[0]) / ((levels[-1] - levels[0]) or 1.0) * (height - 34)

    parts = scale.axis(30, height, x_unit, number)
    parts.append(_text(MARGIN, 14, y_unit))
    for level in levels:
        parts.append(_rule((MARGIN, up(level)), (WIDTH - MARGIN, up(level)), opacity=0.25))
        parts.append(_text(MARGIN + 2, up(level) - 3, number(level)))
    for i, (x, y, error) in enumerate(points.values()):
        color = COLORS[i % len(COLORS)]
        low, high = up(max(y - 2 * error, levels[0])), up(y + 2 * error)
        parts.append(_rule((scale(x), low), (scale(x), high), color, 2, 0.5))
        parts.append(_dot(scale(x), up(y), 6, color))
    for i, label in enumerate(points):
        y = height + AXIS + 4 + 20 * i
        parts.append(_dot(MARGIN + 6, y, 5, COLORS[i % len(COLORS)]))
        parts.append(_text(MARGIN + 18, y + 4, shorten(label, 52)))
    return _chart(height + AXIS + 20 * len(points) + 4, parts, title)


def _bar(start: float, end: float, y: float, color: str, opacity: float) -> Box:
    return Box((round(start, 1), y), round(max(end - start, 0.5), 1), 14, color, opacity)


def _legend(colors: Mapping[str, str]) -> tuple[list[Mark], int]:
    """Boxes with names in lines of WIDTH, and how high they are."""
    parts: list[Mark] = []
    x, y = float(MARGIN), 6
    for name, color in colors.items():
        length = 26 + 6.6 * len(name)
        if x + length > WIDTH and x > MARGIN:
            x, y = float(MARGIN), y + 18
        parts.append(Box((round(x), y), 11, 11, color, 0.85, corner=2))
        parts.append(_text(x + 16, y + 10, name))
        x += length
    return parts, y + 22
