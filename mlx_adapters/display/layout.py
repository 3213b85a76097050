"""What charts consist of, whatever draws them: marks, at places in pixels from the upper left corner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#6b7280")
GRAY = "#808080"
INK = "#767676"  # of a `Chart`
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """A straight line of the grid or the legend."""

    start: tuple[float, float]
    end: tuple[float, float]
    color: str = GRAY
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


def finite(series: Mapping[str, Points]) -> dict[str, list[tuple[float, float]]]:
    """The series that have a finite point, with those points only. Raises ValueError if none is left."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        raise ValueError("nothing to draw")
    return kept


def line_marks(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str, width: int, height: int
) -> list[Mark]:
    """The marks of a chart of `series` (name -> (x, y) points) with grid, axis labels and a legend."""
    kept = finite(series)
    places = [x for points in kept.values() for x, _ in points]
    xs = ticks(min(places), max(places), whole=all(x.is_integer() for x in map(float, places)))
    ys = ticks(min(y for p in kept.values() for _, y in p), max(y for p in kept.values() for _, y in p))
    right, bottom = width - RIGHT, height - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - ys[0]) / ((ys[-1] - ys[0]) or 1)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    marks: list[Mark] = [
        Label((width / 2, 16), title, "middle", 14),
        Label(((LEFT + right) / 2, height - 6), x_label, "middle"),
        Label((14, (TOP + bottom) / 2), y_label, "middle", turned=True),
    ]
    for y in ys:
        _, level = at(xs[0], y)
        marks += [Rule((LEFT, level), (right, level), opacity=0.25), Label((LEFT - 6, level + 4), f"{y:g}", "end")]
    marks += [Label((at(x, ys[0])[0], bottom + 16), f"{x:g}", "middle") for x in xs]
    for number, (name, points) in enumerate(kept.items()):
        color, level = COLORS[number % len(COLORS)], TOP + 14 + 18 * number
        marks.append(Curve([at(*point) for point in points], color, len(points) <= 40))
        marks.append(Rule((right - 150, level - 4), (right - 132, level - 4), color, 3))
        marks.append(Label((right - 126, level), name, "start"))
    return marks
