"""Charts as SVG text, readable on light and dark pages."""

from collections.abc import Mapping
from html import escape

from mlx_adapters.display.layout import GRAY, INK, Box, Chart, Curve, Dot, Label, Mark, Points, Rule, line_marks


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


def picture(chart: Chart) -> str:
    """An SVG of a chart that scales with the page; a page may set the color of its text with CSS."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}"><title>{escape(chart.title)}</title>'
        + "".join(map(_element, chart.marks))
        + "</svg>\n"
    )


def _element(mark: Mark) -> str:
    match mark:
        case Label():
            return _text(mark)
        case Curve():
            return _curve(mark)
        case Rule():
            return _rule(mark)
        case Box():
            return _box(mark)
        case Dot():
            return _dot(mark)


def _box(box: Box) -> str:
    place = f'x="{box.place[0]:.1f}" y="{box.place[1]:g}" width="{box.width:g}" height="{box.height:g}"'
    corner = f' rx="{box.corner:g}"' if box.corner else ""
    return f'<rect {place}{corner} fill="{box.color}" fill-opacity="{box.opacity:g}"/>'


def _dot(dot: Dot) -> str:
    x, y = dot.center
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{dot.radius:g}" fill="{dot.color}" fill-opacity="{dot.opacity:g}"/>'


def _rule(rule: Rule) -> str:
    (x, y), (x2, y2) = rule.start, rule.end
    look = f'stroke="{rule.color}" stroke-width="{rule.width:g}" stroke-opacity="{rule.opacity:g}"'
    look += ' stroke-linecap="round"' if rule.round else ""
    return f'<path d="M{x:.1f} {y:.1f}L{x2:.1f} {y2:.1f}" {look}/>'


def _text(label: Label) -> str:
    x, y = label.place
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if label.turned else f'x="{x:.1f}" y="{y:.1f}"'
    look = f'font-size="{label.size}"' + (' font-weight="600"' if label.bold else "")
    return f'<text {place} text-anchor="{label.anchor}" {look}>{escape(label.text)}</text>'


def _curve(curve: Curve) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in curve.points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{curve.color}"/>' for x, y in curve.points)
    line = f'<polyline points="{path}" fill="none" stroke="{curve.color}" stroke-width="2"/>'
    return line + (dots if curve.dots else "")
