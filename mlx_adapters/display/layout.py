"""What charts consist of, whatever draws them: marks, at places in pixels from the upper left corner.

`named` finds each dot a place for its name, where it crosses no line, no dot and no other name.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlx_adapters.units import columns

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#6b7280", "#db2777", "#0891b2")
INK = "#767676"  # of text and axes, readable on light and dark pages

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """A straight line of the grid or the legend."""

    start: tuple[float, float]
    end: tuple[float, float]
    color: str = INK
    width: float = 1
    opacity: float = 1
    round: bool = False


@dataclass(frozen=True)
class Curve:
    """The line through the points of one series; `dots` marks each of them."""

    points: Points
    color: str
    dots: bool


@dataclass(frozen=True)
class Label:
    """Text whose baseline starts, ends or has its middle (`anchor`) at `place`; `turned` runs upward."""

    place: tuple[float, float]
    text: str
    anchor: str
    size: int = 12
    turned: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Box:
    """A filled rectangle, from its upper left corner; `corner` is the radius of its corners."""

    place: tuple[float, float]
    width: float
    height: float
    color: str
    opacity: float = 1
    corner: float = 0


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    center: tuple[float, float]
    radius: float
    color: str
    opacity: float = 1


Mark = Rule | Curve | Label | Box | Dot


@dataclass(frozen=True)
class Chart:
    """A picture: its marks from the lowest to the uppermost, and a title that is not drawn."""

    title: str
    width: int
    height: int
    marks: Sequence[Mark]


def moved(mark: Mark, down: float) -> Mark:
    """The same mark lower in the picture."""
    match mark:
        case Rule(start=(x, y), end=(x2, y2)):
            return replace(mark, start=(x, y + down), end=(x2, y2 + down))
        case Curve():
            return replace(mark, points=[(x, y + down) for x, y in mark.points])
        case Dot(center=(x, y)):
            return replace(mark, center=(x, y + down))
        case Label(place=(x, y)) | Box(place=(x, y)):
            return replace(mark, place=(x, y + down))


def stacked_up(charts: Sequence[Chart], title: str) -> Chart:
    """Charts of one width below each other as one picture."""
    marks, height = list[Mark](), 0
    for chart in charts:
        marks += [moved(mark, height) for mark in chart.marks]
        height += chart.height
    return Chart(title, charts[0].width, height, marks)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers that cover `low` to `high`; `whole`: no fractions."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def told_ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` ticks that three digits tell: a label of 102 at 102.5 would be none."""
    for fewer in range(count, 0, -1):
        found = ticks(low, high, fewer)
        if all(math.isclose(float(f"{value:.3g}"), value) for value in found):
            break
    return found


def finite(series: Mapping[str, Points]) -> dict[str, list[tuple[float, float]]]:
    """The series that have a finite point, with those points only. Raises ValueError if none is left."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        raise ValueError("nothing to draw")
    return kept


class Area(NamedTuple):
    """A rectangle: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Area") -> bool:
        """Whether both cover a place."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def wider(self, by: float) -> "Area":
        """The same with room around it."""
        return Area(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def cut_to(self, frame: "Area") -> "Area":
        """The part of it in `frame`."""
        left, top = max(self.left, frame.left), max(self.top, frame.top)
        return Area(left, top, min(self.right, frame.right), min(self.bottom, frame.bottom))

    def crossed(self, line: Rule) -> bool:
        """Whether a straight line passes through: what is left of it after clipping at the four sides."""
        (x, y), (x2, y2) = line.start, line.end
        first, last = 0.0, 1.0
        sides = ((x, x2 - x, self.left, self.right), (y, y2 - y, self.top, self.bottom))
        for start, step, low, high in sides:
            if step == 0:
                if not low < start < high:
                    return False
                continue
            near, far = sorted(((low - start) / step, (high - start) / step))
            first, last = max(first, near), min(last, far)
        return first < last


def area_of(mark: Label | Dot) -> Area:
    """What a name or a dot covers. Letters differ by font; none that draws a chart is wider on average."""
    if isinstance(mark, Dot):
        (x, y), r = mark.center, mark.radius
        return Area(x - r, y - r, x + r, y + r)
    (x, y), width = mark.place, 0.62 * mark.size * columns(mark.text)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[mark.anchor]
    return Area(left, y - 0.85 * mark.size, left + width, y + 0.3 * mark.size)


def named(dots: Sequence[tuple[str, Dot]], lines: Sequence[Rule], frame: Area) -> list[list[Mark]]:
    """For each dot its name and, where that is not beside the dot, the line from the dot to it.

    Places near the dot come first. A name that finds no place in the frame gives no marks.
    """
    taken, drawn = [area_of(dot) for _, dot in dots], list(lines)
    placed = list[list[Mark]]()
    for name, dot in dots:
        blocking = [area_of(other) for _, other in dots if other.center != dot.center] + taken[len(dots) :]
        placed.append([])
        for label, leader in _places(name, dot):
            area = area_of(label)
            if area != area.cut_to(frame) or any(area.meets(other) for other in taken):
                continue
            if any(area.wider(2).crossed(line) for line in drawn) or (
                leader and any(b.crossed(leader) for b in blocking)
            ):
                continue
            taken.append(area)
            drawn += [leader] if leader else []
            placed[-1] = [leader, label] if leader else [label]
            break
    return placed


def _places(name: str, dot: Dot) -> Iterator[tuple[Label, Rule | None]]:
    """Where a dot's name may stand: around it, then farther and farther away, with a line."""
    x, y = dot.center
    sides = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
    for distance in (4, 16, 30, 46, 64, 84):
        for across, down in sides:
            reach = dot.radius + distance * (0.75 if across and down else 1)
            end = x + across * reach, y + down * reach
            baseline = end[1] + {-1: -4, 0: 4, 1: 11}[down]
            label = Label((round(end[0], 1), round(baseline, 1)), name, ("end", "middle", "start")[across + 1])
            start = x + across * dot.radius * 0.7, y + down * dot.radius * 0.7
            yield label, Rule(start, end, dot.color, opacity=0.7) if distance > 4 else None
