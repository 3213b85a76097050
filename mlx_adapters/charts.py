"""Line charts as SVG text: readable on light and dark pages, no library needed."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#6b7280")
GRAY = "#808080"
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 40

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def line_chart(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str, width: int = 640, height: int = 320
) -> str:
    """An SVG of `series` (name -> (x, y) points) with axes and a legend. Points that are not finite are left out.

    Raises ValueError if no point is left.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
            for name, points in series.items()}  # fmt: skip
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        raise ValueError("nothing to draw")
    xs = ticks(min(x for p in kept.values() for x, _ in p), max(x for p in kept.values() for x, _ in p))
    ys = ticks(min(y for p in kept.values() for _, y in p), max(y for p in kept.values() for _, y in p))
    right, bottom = width - RIGHT, height - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - ys[0]) / ((ys[-1] - ys[0]) or 1)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{GRAY}">',
        _text(width / 2, 16, title, "middle", 14),
        _text((LEFT + right) / 2, height - 6, x_label, "middle"),
        f'<text transform="translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for y in ys:
        _, level = at(xs[0], y)
        parts.append(f'<path d="M{LEFT} {level:.1f}H{right}" stroke="{GRAY}" stroke-opacity="0.25"/>')
        parts.append(_text(LEFT - 6, level + 4, f"{y:g}", "end"))
    parts += [_text(at(x, ys[0])[0], bottom + 16, f"{x:g}", "middle") for x in xs]
    for number, (name, points) in enumerate(kept.items()):
        color = COLORS[number % len(COLORS)]
        parts.append(_line([at(*point) for point in points], color))
        parts.append(_legend(right - 150, TOP + 14 + 18 * number, name, color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(points: Points, color: str) -> str:
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>' + (
        dots if len(points) <= 40 else ""
    )


def _legend(x: float, y: float, name: str, color: str) -> str:
    return f'<path d="M{x} {y - 4}h18" stroke="{color}" stroke-width="3"/>' + _text(x + 24, y, name, "start")
