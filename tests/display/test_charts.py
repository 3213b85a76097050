"""Charts: what is drawn is where the figures say, in an SVG as in a PNG, and no name crosses a line or another."""

import itertools
import struct
import xml.etree.ElementTree
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.display import charts, layout, png, svg, terminal
from mlx_adapters.display.charts import Axis, Spot
from mlx_adapters.display.layout import Area, Dot, Label, Rule, area_of


@given(st.lists(st.tuples(st.floats(allow_nan=True, width=32), st.floats(width=32)), max_size=20))
def test_any_points_make_a_picture_or_are_refused(points):
    try:
        xml.etree.ElementTree.fromstring(svg.picture(charts.lines({"<a & b>": points}, "t", "x", "y")))
        assert len(terminal.line_chart({"<a & b>": points})) == 15
    except ValueError as error:
        assert str(error) == "nothing to draw"


@pytest.mark.parametrize(("last", "shown"), [(12, "0 5 10 15"), (3, "0 1 2 3"), (600, "0 200 400 600")])
def test_iterations_are_counted_in_whole_numbers(last, shown):
    root = xml.etree.ElementTree.fromstring(svg.picture(charts.lines({"loss": [(0, 1.0), (last, 2.5)]}, "", "", "")))
    texts = [element for element in root.iter("{http://www.w3.org/2000/svg}text") if (element.text or "").isdigit()]
    lowest = max(float(element.get("y")) for element in texts)
    assert " ".join(element.text for element in texts if float(element.get("y")) == lowest) == shown


CURVES = {"training": [(10, 3.0), (20, 1.0), (30, 0.5)], "validation": [(0, 3.0), (30, 1.0)]}


def test_a_png_shows_both_curves_where_the_svg_has_them():
    data = png.picture(charts.lines(CURVES, "sql é", "iteration", "loss"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[16:24] == struct.pack(">II", 1280, 640)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    body = data[start + 4 : start + 4 + length]
    assert struct.unpack(">I", data[start + 4 + length :][:4]) == (zlib.crc32(b"IDAT" + body),)
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(640, 1 + 3 * 1280)
    assert not lines[:, 0].any()
    pixels = lines[:, 1:].reshape(640, 1280, 3)
    root = xml.etree.ElementTree.fromstring(svg.picture(charts.lines(CURVES, "sql é", "iteration", "loss")))
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        color = [int(line.get("stroke")[i : i + 2], 16) for i in (1, 3, 5)]
        for point in line.get("points").split():
            x, y = (round(2 * float(part)) for part in point.split(","))
            assert pixels[y, x].tolist() in (color, [int(layout.COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    assert {tuple(p) for p in pixels[10:40].reshape(-1, 3)} >= {(255, 255, 255), (118, 118, 118)}  # the title


def test_a_terminal_shows_both_curves_with_scale_axis_and_legend():
    lines = terminal.line_chart(CURVES, width=60, height=9)
    assert max(map(len, lines)) <= 60 and len(lines) == 12
    assert lines[0].lstrip().startswith("3 │━") and lines[8].lstrip().startswith("0.5 │") and lines[8].endswith("─")
    assert lines[10].split() == ["0", "30"] and "── training   ━━ validation" in lines[11]
    flat = terminal.line_chart({"training": [(1, 2.0), (2, 2.0)]}, height=9)
    assert flat[4].count("─") > 60 and not any("─" in line for line in flat[:4])


# -- quality against what it costs -------------------------------------------------------------------

RIGHT = Axis("right answers", lambda share: f"{share:.0%}", limits=(0, 1))
KL = Axis("KL", lambda kl: f"{kl:g}", logarithmic=True, reversed=True)
SIZE = Axis("size")
FIVE = {
    "base": (76.0, 0.0),
    "adapter": (81.0, 0.925),
    "8 bits": (143.0, 0.925),
    "4 bits": (76.2, 0.95),
    "nearest": (76.2, 0.6),
}


def names_of(chart):
    return [mark for mark in chart.marks if isinstance(mark, Label)]


def dots_of(chart):
    return [mark for mark in chart.marks if isinstance(mark, Dot) and mark.radius == 6]


def check_nothing_crosses(chart):
    """No text crosses a line, a dot or another text, or leaves the picture."""
    texts = [area_of(label) for label in names_of(chart)]
    for one, other in itertools.combinations(texts, 2):
        assert not one.meets(other), (one, other)
    for text in texts:
        assert not any(text.crossed(line) for line in chart.marks if isinstance(line, Rule)), text
        assert not any(text.meets(area_of(dot)) for dot in chart.marks if isinstance(dot, Dot)), text
        assert text.left >= 0 and text.top >= 0 and text.bottom <= chart.height
        assert text.right <= chart.width + 0.1


def test_every_variant_has_a_dot_where_its_figures_are_and_a_name_beside_it():
    chart = charts.tradeoff({n: Spot(x, y) for n, (x, y) in FIVE.items()}, "t", SIZE, RIGHT)
    dots = dots_of(chart)
    assert len({dot.color for dot in dots}) == len(FIVE)
    places = dict(zip(FIVE, (dot.center for dot in dots), strict=True))
    for (one, (x, y)), (other, (x2, y2)) in itertools.permutations(FIVE.items(), 2):
        assert (x < x2) == (places[one][0] < places[other][0]) and (y > y2) == (places[one][1] < places[other][1])
    for label in names_of(chart):
        if label.text in FIVE:
            (x, y), area = places[label.text], area_of(label)
            assert max(area.left - x, x - area.right, area.top - y, y - area.bottom) < 30
    check_nothing_crosses(chart)


def test_the_scales_fit_the_data():
    """What lies between 76 and 143 is spread over the width, not squeezed beside an empty start at 0."""
    xs = [dot.center[0] for dot in dots_of(charts.tradeoff({n: Spot(*s) for n, s in FIVE.items()}, "t", SIZE, RIGHT))]
    assert max(xs) - min(xs) > 0.6 * charts.WIDTH
    shown = {label.text for label in names_of(charts.tradeoff({"a": Spot(1, 0.3)}, "t", SIZE, RIGHT))}
    assert "a" in shown and len(shown) >= 4  # one variant has an axis too


def test_a_label_of_three_digits_tells_the_place_of_its_tick():
    for low, high in ((101.6e6, 111.5e6), (1020.5e6, 1030.7e6), (6.9, 8.0), (0.0, 1.0)):
        found = layout.told_ticks(low, high, 4)
        assert [float(f"{value:.3g}") for value in found] == pytest.approx(found) and found[0] <= low < high <= found[
            -1
        ]


def test_less_distance_is_higher_and_none_has_a_place_of_its_own():
    """KL goes by powers of ten; 0, the adapter itself, is above all others."""
    kls = {"base": 2.73, "adapter": 0.0, "8 bits": 0.0004, "4 bits": 0.0013}
    chart = charts.tradeoff({n: Spot(1, kl) for n, kl in kls.items()}, "t", SIZE, KL)
    heights = dict(zip(kls, (dot.center[1] for dot in dots_of(chart)), strict=True))
    assert sorted(kls, key=heights.__getitem__) == ["adapter", "8 bits", "4 bits", "base"]
    assert heights["4 bits"] - heights["8 bits"] == pytest.approx(
        (heights["base"] - heights["4 bits"]) * np.log10(13 / 4) / np.log10(2730 / 1.3), abs=0.3
    )
    assert {"0", "10"} <= {label.text for label in names_of(chart)}


def test_names_that_find_no_place_stand_below():
    crowd = {f"out/a-rather-long-name-{i}": Spot(1, 0.5, (0, 2), (0, 1)) for i in range(12)}
    chart = charts.tradeoff(crowd, "t", SIZE, RIGHT)
    assert sorted(n.text for n in names_of(chart) if n.text.startswith("out/")) == sorted(crowd)
    check_nothing_crosses(chart)


figures = st.floats(0, 1).map(lambda share: round(share, 3))


@given(
    st.lists(st.tuples(figures, figures, figures, figures), min_size=1, max_size=8),
    st.lists(st.text("abMW .-é字", min_size=1, max_size=40), min_size=8, max_size=8, unique=True),
    st.sampled_from([RIGHT, KL, Axis("loss", reversed=True)]),
    st.sampled_from([1.0, 1e-6, 3.7e9]),
)
def test_whatever_the_figures_no_name_crosses_a_line_or_another(figures, names, up, factor):
    spots = {
        name: Spot(factor * x, y, (factor * x * (1 - off), factor * x * (1 + off)), (max(y - high, 0), y + high))
        for name, (x, y, off, high) in zip(names, figures, strict=False)
    }
    chart = charts.tradeoff(spots, "t", Axis("x", lambda value: f"{value:.3g}"), up)
    texts = names_of(chart)
    for name in spots:
        assert charts.shorten(name, 28) in [label.text for label in texts]
    check_nothing_crosses(chart)
    for dot in dots_of(chart):
        assert 50 < dot.center[0] < charts.WIDTH and 20 < dot.center[1] < 200


@pytest.mark.parametrize("count", [1, 3, 9])
def test_bars_and_intervals_are_drawn_beside_their_texts(count):
    rows = {f"variant {i}": [10.0 + i, 20.0 + i] for i in range(count)}
    check_nothing_crosses(charts.strips(rows, "t", "tok/s"))
    parts = {name: {"warm": a, "cold": b} for name, (a, b) in rows.items()}
    check_nothing_crosses(charts.grouped(parts, "t", "s", str))
    check_nothing_crosses(charts.stacked(parts, "t", "s", str))
    check_nothing_crosses(charts.intervals([(name, -a, b - a, b) for name, (a, b) in rows.items()], "t", "%"))
    check_nothing_crosses(charts.lines({name: [(0, a), (9, b)] for name, (a, b) in rows.items()}, "t", "x", "y"))


def test_a_line_crosses_an_area_only_if_it_passes_through():
    area = Area(10, 10, 20, 20)
    through = [((0, 15), (30, 15)), ((15, 0), (15, 30)), ((0, 0), (30, 30)), ((12, 12), (13, 13))]
    past = [((0, 15), (9, 15)), ((0, 30), (30, 25)), ((0, 12), (12, 0)), ((5, 0), (5, 30))]
    for start, end in through + past:
        crossed = (start, end) in through
        assert area.crossed(Rule(start, end)) == crossed == area.crossed(Rule(end, start)), (start, end)


def test_charts_below_each_other_are_one_picture():
    one = charts.tradeoff({"a": Spot(1, 0.3), "b": Spot(2, 0.9)}, "t", SIZE, RIGHT)
    both = layout.stacked_up([one, one], "both")
    assert both.height == 2 * one.height and len(both.marks) == 2 * len(one.marks)
    first, second = (dot.center for dot in dots_of(both)[::2])
    assert second == (first[0], first[1] + one.height)
    check_nothing_crosses(both)
