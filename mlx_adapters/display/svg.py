"""Charts as SVG text, readable on light and dark pages."""

from collections.abc import Mapping
from html import escape

from mlx_adapters.display.layout import GRAY, Curve, Label, Mark, Points, Rule, line_marks


def line_chart(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str, width: int = 640, height: int = 320
) -> str:
    """An SVG of `series` (name -> (x, y) points) with axes and a legend. Points that are not finite are left out.

    Raises ValueError if no point is left.
    """
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{GRAY}">'
    )
    marks = line_marks(series, title, x_label, y_label, width, height)
    return "\n".join([head, *map(_element, marks), "</svg>"]) + "\n"


def _element(mark: Mark) -> str:
    if isinstance(mark, Label):
        return _text(mark)
    return _curve(mark) if isinstance(mark, Curve) else _rule(mark)


def _rule(rule: Rule) -> str:
    (x, y), (x2, y2) = rule.start, rule.end
    look = f'stroke="{rule.color}" stroke-width="{rule.width:g}" stroke-opacity="{rule.opacity:g}"'
    return f'<path d="M{x:.1f} {y:.1f}L{x2:.1f} {y2:.1f}" {look}/>'


def _text(label: Label) -> str:
    x, y = label.place
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if label.turned else f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} text-anchor="{label.anchor}" font-size="{label.size}">{escape(label.text)}</text>'


def _curve(curve: Curve) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve.points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{curve.color}"/>' for x, y in curve.points)
    line = f'<polyline points="{path}" fill="none" stroke="{curve.color}" stroke-width="2"/>'
    return line + (dots if curve.dots else "")
