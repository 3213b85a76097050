"""Line charts: as SVG, as PNG and as lines of text. No library is needed for any of them."""

from mlx_adapters.charts.layout import COLORS, Points, ticks
from mlx_adapters.charts.svg import line_chart

__all__ = ["COLORS", "Points", "line_chart", "ticks"]
