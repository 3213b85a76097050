"""Charts as SVG text, readable on light and dark pages."""

from html import escape

from mlx_adapters.display.layout import INK, Box, Chart, Curve, Dot, Label, Mark, Rule


def picture(chart: Chart) -> str:
    """An SVG of a chart, at most as wide as the page; a page may set its width and the color of its text with CSS."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {chart.height}" width="{chart.width}" '
        f'height="{chart.height}" style="max-width:100%;height:auto" role="img" '
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
