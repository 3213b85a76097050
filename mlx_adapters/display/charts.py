"""Charts to draw: bars are horizontal, with labels above them, so that a phone can show them.

Text is gray and bars are mid-tones, readable on light and dark pages; a page may set its own with CSS.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from mlx_adapters.display.layout import (
    COLORS,
    INK,
    Area,
    Box,
    Chart,
    Curve,
    Dot,
    Label,
    Mark,
    Points,
    Rule,
    area_of,
    finite,
    named,
    ticks,
    told_ticks,
)
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

    def axis(self, bands: Sequence[tuple[float, float]], bottom: float, label: str, show: Format) -> list[Mark]:
        """Ticks with a label below, and a line behind each band of bars, so that none crosses a text."""
        parts: list[Mark] = []
        for value in self.ticks:
            x, last = self(value), value == self.ticks[-1]
            parts += [_rule((x, top), (x, end), opacity=0.25) for top, end in bands]
            anchor = "end" if last else "start" if value == self.ticks[0] else "middle"
            parts.append(_text(x, bottom + 16, show(value), anchor))
        return [*parts, _text(WIDTH / 2, bottom + 34, label, "middle")]


def strips(rows: Mapping[str, Sequence[float]], title: str, unit: str) -> Chart:
    """Every trial as a dot and the median as a bar from zero, one line for each variant."""
    scale = _Scale(0, max(max(values) for values in rows.values()))
    bottom = ROW * len(rows) + 4
    parts = scale.axis(_bands(len(rows)), bottom, unit, number)
    for i, (label, values) in enumerate(rows.items()):
        y, color, middle = ROW * i, COLORS[i % len(COLORS)], median(values)
        parts.append(_text(MARGIN, y + 15, shorten(label)))
        parts.append(_text(WIDTH - MARGIN, y + 15, number(middle), "end", bold=True))
        parts.append(_bar(scale(0), scale(middle), y + 21, color, 0.35))
        parts += [_dot(scale(v), y + 28, 3, color, 0.7) for v in values]
    return _chart(bottom + AXIS, parts, title)


def _bands(count: int, top: float = 0, height: float = ROW) -> list[tuple[float, float]]:
    """From where to where each row's bars reach, below its label."""
    return [(top + height * i + 19, top + height * (i + 1) - 7) for i in range(count)]


def stacked(rows: Mapping[str, Mapping[str, float]], title: str, unit: str, show: Format) -> Chart:
    """One bar for each variant, made of named parts; parts of one name share a color."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    scale = _Scale(0, max(sum(parts.values()) for parts in rows.values()))
    legend, top = _legend(colors)
    bottom = top + ROW * len(rows) + 4
    out = [*legend, *scale.axis(_bands(len(rows), top), bottom, unit, show)]
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
    out = [*legend, *scale.axis(_bands(len(rows), top, height), bottom, unit, show)]
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
    parts = scale.axis(_bands(len(rows)), bottom, unit, lambda v: f"{v:+g}" if v else "0")
    parts += [_rule((scale(0), start), (scale(0), end), width=1.5) for start, end in _bands(len(rows))]
    for i, (label, start, value, end) in enumerate(rows):
        y, sure = ROW * i, start > 0 or end < 0
        color = COLORS[0] if sure else INK
        words = f"{value:+.1f} [{start:+.1f}, {end:+.1f}]"
        parts.append(_text(MARGIN, y + 15, shorten(label, 56 - len(words))))
        parts.append(_text(WIDTH - MARGIN, y + 15, words, "end", bold=sure))
        parts.append(_rule((scale(start), y + 28), (scale(end), y + 28), color, 3, 0.6, rounded=True))
        parts.append(_dot(scale(value), y + 28, 5, color))
    return _chart(bottom + AXIS, parts, title)


@dataclass(frozen=True)
class Spot:
    """A variant in a trade-off: what it costs or gives (`x`), how good it is (`y`), and how far each may be off."""

    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """What an axis is called and how its ticks are written. `logarithmic`: by powers of ten, with a place for 0.
    `reversed`: less is better, so the least is at the top."""

    label: str
    show: Format = number
    logarithmic: bool = False
    reversed: bool = False
    limits: tuple[float, float] | None = None


def tradeoff(spots: Mapping[str, Spot], title: str, across: Axis, up: Axis) -> Chart:
    """A named dot for each variant, its ranges as thin lines. Names that find no place stand below.

    The scales fit the data: neither starts at zero unless the data do.
    """
    frame = Area(50, 24, WIDTH - 6, 190)
    x_at = _Fitted([v for s in spots.values() for v in (s.x, *(s.x_range or ()))], across, frame.left, frame.right)
    y_at = _Fitted([v for s in spots.values() for v in (s.y, *(s.y_range or ()))], up, frame.bottom, frame.top)
    marks: list[Mark] = [
        _text(2, 14, up.label),
        _text((frame.left + frame.right) / 2, frame.bottom + 36, across.label, "middle"),
        _rule((frame.left, frame.bottom), (frame.right, frame.bottom), opacity=0.5),
        _rule((frame.left, frame.top), (frame.left, frame.bottom), opacity=0.5),
    ]
    for value in x_at.ticks:
        marks.append(_rule((x_at(value), frame.bottom), (x_at(value), frame.bottom + 4), opacity=0.5))
        tick = _text(x_at(value), frame.bottom + 18, across.show(value), "middle")
        outside = max(area_of(tick).right - WIDTH, 0)
        marks.append(replace(tick, place=(tick.place[0] - outside, tick.place[1])))
    for value in y_at.ticks:
        marks.append(_rule((frame.left - 4, y_at(value)), (frame.left, y_at(value)), opacity=0.5))
        marks.append(_text(frame.left - 7, y_at(value) + 4, up.show(value), "end"))
    dots, ranges = list[tuple[str, Dot]](), list[Rule]()
    for i, (name, spot) in enumerate(spots.items()):
        color, x, y = COLORS[i % len(COLORS)], x_at(spot.x), y_at(spot.y)
        dots.append((shorten(name, 28), _dot(x, y, 6, color)))
        if spot.x_range:
            ranges.append(_rule((x_at(spot.x_range[0]), y), (x_at(spot.x_range[1]), y), color, 1.5, 0.5))
        if spot.y_range:
            ranges.append(_rule((x, y_at(spot.y_range[0])), (x, y_at(spot.y_range[1])), color, 1.5, 0.5))
    placed = named(dots, ranges, frame)
    marks += [*ranges, *(dot for _, dot in dots), *(mark for parts in placed for mark in parts)]
    height = frame.bottom + AXIS
    for (name, dot), parts in zip(dots, placed, strict=True):
        if not parts:
            marks += [_dot(frame.left, height + 8, 5, dot.color), _text(frame.left + 12, height + 12, name)]
            height += 20
    return _chart(height, marks, title)


def distances(models: Mapping[str, tuple[float | None, float | None]]) -> Chart | None:
    """(loss, KL from the adapter) in nats per token of each model: what fusing lost, and what not fine-tuning loses.
    None where fewer than two are known."""
    up = Axis("KL from the adapter, in nats", lambda kl: f"{kl:g}", logarithmic=True, reversed=True)
    spots = dict[str, Spot]()
    for name, (loss, kl) in models.items():
        if loss is not None and kl is not None and math.isfinite(loss + kl):
            spots[name] = Spot(loss, max(kl, 0.0))
    title = "Distance from the adapter"
    return tradeoff(spots, title, Axis("loss, nats per token"), up) if len(spots) > 1 else None


class _Fitted:
    """From the values of an axis to pixels between `start` and `end`, with ticks that fit them."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        low, high = min(values), max(values)
        if axis.logarithmic:
            powers = [math.log10(value) for value in values if value > 0] or [0.0]
            first, last = math.floor(min(powers)), max(math.ceil(max(powers)), math.floor(min(powers)) + 1)
            every = math.ceil((last - first + 1) / 5)
            zero = [0.0] if low <= 0 else []  # stands one power below the least
            self.ticks = zero + [10.0**power for power in range(last, first - 1, -every)]
            self.low, self.high = float(first - len(zero)), float(last)
        else:
            least, most = axis.limits or (low, high)
            low, high = max(low, least), min(high, most)
            marked = told_ticks(low, high, 4)
            near = 0.2 * (high - low) if high > low else math.inf  # a tick that is near is worth its room
            self.low = marked[0] if low - marked[0] <= near else low
            self.high = marked[-1] if marked[-1] - high <= near else high
            self.ticks = [value for value in marked if self.low <= value <= self.high]
        inset = math.copysign(18, end - start)  # room for names around the outermost dots
        ends = start + inset, end - inset
        self.start, self.end = ends[::-1] if axis.reversed else ends
        self.logarithmic = axis.logarithmic

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)


def lines(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str, width: int = 640, height: int = 320
) -> Chart:
    """`series` (name -> (x, y) points) with grid, axis labels and a legend.

    Raises ValueError if no finite point is left.
    """
    kept, left = finite(series), 56
    legend, top = _legend({name: COLORS[i % len(COLORS)] for i, name in enumerate(kept)}, left, width - 16, 26)
    places = [x for points in kept.values() for x, _ in points]
    xs = ticks(min(places), max(places), whole=all(x.is_integer() for x in map(float, places)))
    ys = ticks(min(y for p in kept.values() for _, y in p), max(y for p in kept.values() for _, y in p))
    right, bottom = width - 16, height - 40

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - ys[0]) / ((ys[-1] - ys[0]) or 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    marks: list[Mark] = [
        *legend,
        Label((width / 2, 16), title, "middle", 14),
        Label(((left + right) / 2, height - 6), x_label, "middle"),
        Label((14, (top + bottom) / 2), y_label, "middle", turned=True),
    ]
    for y in ys:
        _, level = at(xs[0], y)
        marks += [Rule((left, level), (right, level), opacity=0.25), Label((left - 6, level + 4), f"{y:g}", "end")]
    marks += [Label((at(x, ys[0])[0], bottom + 16), f"{x:g}", "middle") for x in xs]
    for i, points in enumerate(kept.values()):
        color = COLORS[i % len(COLORS)]
        marks.append(Curve([at(*point) for point in points], color, len(points) <= 40))
    return Chart(title, width, height, marks)


def _bar(start: float, end: float, y: float, color: str, opacity: float) -> Box:
    return Box((round(start, 1), y), round(max(end - start, 0.5), 1), 14, color, opacity)


def _legend(
    colors: Mapping[str, str], left: float = MARGIN, right: float = WIDTH, top: int = 6
) -> tuple[list[Mark], int]:
    """Boxes with names, in lines from `left` to `right`, and where they end."""
    parts: list[Mark] = []
    x, y = left, top
    for name, color in colors.items():
        label = _text(x + 16, y + 10, name)
        if area_of(label).right > right and x > left:
            x, y = left, y + 18
            label = _text(x + 16, y + 10, name)
        parts += [Box((round(x), y), 11, 11, color, 0.85, corner=2), label]
        x = area_of(label).right + 10
    return parts, y + 22
