"""Charts as lines of text, each series in box-drawing characters of its own."""

from collections.abc import Mapping

import numpy as np

from mlx_adapters.display.layout import Points, finite
from mlx_adapters.units import number

# Level, down to the right, up to the right (left half, then right half of a corner pair), and between.
STYLES = (tuple("─╮╰╯╭│"), tuple("━┓┗┛┏┃"))


def line_chart(series: Mapping[str, Points], width: int = 76, height: int = 12) -> list[str]:
    """Up to two series (name -> (x, y) points) as text of `width` columns: a scale, `height` rows, the x axis and
    a legend. Raises ValueError if no finite point is left."""
    kept = finite(series)
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) or 1), high + (abs(low) or 1)
    shown = {*range(2, height - 2, 3), 0, height - 1}
    marks = [number(high - (high - low) * row / (height - 1), 3) if row in shown else "" for row in range(height)]
    margin = max(map(len, marks))
    columns = max(width - margin - 2, 2)
    grid = [[" "] * columns for _ in range(height)]
    for style, points in zip(STYLES, kept.values(), strict=False):
        levels = _levels(points, min(xs), max(xs), columns)
        rows = [None if y is None else round((high - y) / (high - low) * (height - 1)) for y in levels]
        _trace(grid, rows, style)
    lines = [f"{mark:>{margin}} │" + "".join(cells).rstrip() for mark, cells in zip(marks, grid, strict=True)]
    first, last = f"{min(xs):g}", f"{max(xs):g}"
    axis = " " * margin + " └" + "─" * columns
    legend = "   ".join(f"{style[0] * 2} {name}" for style, name in zip(STYLES, kept, strict=False))
    space = " " * (margin + 2)
    return [*lines, axis, space + first + last.rjust(columns - len(first)), space + legend]


def _levels(points: Points, first: float, last: float, columns: int) -> list[float | None]:
    """The series' value in each column: the mean of its points there, else between its neighbors."""
    x, y = np.array(sorted(points), float).T
    step = ((last - first) or 1) / (columns - 1)
    at = np.round((x - first) / step).astype(int)
    filled = np.unique(at)
    means = np.clip([y[at == column].mean() for column in filled], y.min(), y.max())
    return [float(np.interp(c, filled, means)) if filled[0] <= c <= filled[-1] else None for c in range(columns)]


def _trace(grid: list[list[str]], rows: list[int | None], style: tuple[str, ...]) -> None:
    level, down_in, down_out, up_in, up_out, between = style
    before: int | None = None
    for column, row in enumerate(rows):
        if row is None:
            continue
        if before is None or row == before:
            grid[row][column] = level
        else:
            start, end = (down_in, down_out) if row > before else (up_in, up_out)
            for middle in range(min(row, before) + 1, max(row, before)):
                grid[middle][column] = between
            grid[before][column], grid[row][column] = start, end
        before = row
