"""Bars and tables fit the terminal's width, and nothing of a table is lost."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_adapters.display.screen import bar, facts_as_text, folded_table, prose
from mlx_adapters.units import columns, cut, format_table

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
HEADS = ["VARIANT", "LOAD s", "PREFILL tok/s", "DECODE tok/s", "PEAK GB"]
ROWS = [
    ["base", "0.41", "5,230 (5,180-5,260)", "312.4 (309.8-313.0)", "0.61"],
    ["fuse:some-long-name@1200:4", "0.52", "5,100 (5,080-5,160)", "401.4 (399.8-403.0)", "0.41"],
]


class Ascii(io.StringIO):
    encoding = "ascii"


def plain(text: str) -> str:
    return ESCAPE.sub("", text)


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20, 5])
def test_a_bar_is_one_line_of_the_width(width):
    line = bar("calibrate: round", 0.5, "12/24 layers, 3.2/s, 4.0 s left", io.StringIO(), width, color=True)
    assert "\n" not in line and columns(plain(line)) <= width and ("━" in line) == (width > 52)


def test_a_bar_is_full_to_its_share_and_gives_way_to_the_texts():
    def shown(share: float, width: int) -> str:
        return bar("fuse", share, "half", io.StringIO(), width, color=False)

    assert [shown(share, 80).count("━") for share in (0.0, 0.5, 1.0)] == [0, 15, 30]
    assert shown(0.5, 80).startswith("fuse ━") and {columns(shown(share, 80)) for share in (0.0, 0.3, 1.0)} == {40}
    assert "fuse" in shown(1.0, 16) and "half" in shown(1.0, 16) and 0 < shown(1.0, 16).count("━") < 8


def test_a_bar_has_signs_that_the_stream_can_write_and_colors_only_if_wanted():
    assert bar("fuse", 0.9, "", Ascii(), 80, color=True).isascii()
    assert "\x1b" not in bar("fuse", 0.9, "", io.StringIO(), 80, color=False)
    assert "[red]" in plain(bar("[red]", 0.9, "", io.StringIO(), 80, color=True)), "text is no markup"


def test_a_table_that_is_too_wide_is_folded_between_words():
    text = folded_table(HEADS, ROWS, range(1, 5), io.StringIO(), 70, color=False)
    assert text.splitlines()[1:] == [
        "base             0.41           5,230           312.4     0.61",
        "                        (5,180-5,260)   (309.8-313.0)",
        "fuse:some-lon    0.52           5,100           401.4     0.41",
        "g-name@1200:4           (5,080-5,160)   (399.8-403.0)",
    ] or all(len(line) <= 70 for line in text.splitlines())
    assert "(5,180-5,260)" in text and "(399.8-403.0)" in text


def test_a_table_that_cannot_be_folded_is_a_block_for_each_row():
    text = folded_table(HEADS, ROWS, range(1, 5), io.StringIO(), 50, color=False)
    assert text.splitlines()[:6] == [
        "VARIANT        base",
        "LOAD s         0.41",
        "PREFILL tok/s  5,230 (5,180-5,260)",
        "DECODE tok/s   312.4 (309.8-313.0)",
        "PEAK GB        0.61",
        "",
    ]


CELL = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]), max_size=30)


@given(st.lists(st.lists(CELL, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(12, 90))
def test_nothing_of_a_table_is_lost_and_no_line_is_too_long(rows, width):
    text = folded_table(["A", "B", "C"], rows, [2], io.StringIO(), width, color=False)
    assert all(columns(line) <= width for line in text.splitlines())
    assert sorted("".join(text.split())) in (
        sorted("ABC" + "".join(map("".join, rows))),
        sorted("ABC" * len(rows) + "".join(map("".join, rows))),
    )


def test_signs_that_take_two_columns_are_counted_so():
    assert columns("漢字é") == 5 and cut("漢字x", 3) in ("漢", "漢 ") and cut("abc", 2) == "ab" and cut("漢", 2) == "漢"
    assert format_table(["A", "B"], [["漢字", "1"], ["abcd", "22"]], [1]).splitlines() == [
        "A      B",
        "漢字   1",
        "abcd  22",
    ]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_numbers_keep_their_units_and_names_break_at_hyphens(width):
    rows = [
        ["tiny-with-a-rather-long-name-of-an-adapter", "9.81 MB", "2026-11-29 12:01", "mlx-community/Qwen3-4B-4bit"]
    ]
    text = folded_table(["NAME", "SIZE", "DATE", "BASE"], rows, (1,), io.StringIO(), width, color=False)
    assert "9.81 MB" in text and max(map(len, text.splitlines())) <= width
    assert width < 80 or re.search(r"^tiny-with-a-\S*-\s", text, re.M)


def test_what_ends_in_spaces_does_not_also_in_color():
    text = folded_table(HEADS, ROWS, range(1, 5), io.StringIO(), 30, color=True)
    assert not re.search(r" $", plain(text), re.M) and "\n\n" in plain(text)


@given(st.lists(st.text("ab -\n", max_size=40), max_size=8).map(" ".join), st.integers(13, 60))
def test_prose_keeps_its_words_and_breaks_none(text, width):
    assert prose(text, width).split() == text.split()
    too_long = [line for line in prose(text, width).split("\n") if len(line) > width]
    assert all(len(line.split()) <= 1 or len(line) - len(line.lstrip(" -")) > width - 13 for line in too_long)


def test_facts_stand_below_each_other_in_the_width_and_commands_stay_whole():
    told = facts_as_text([("a long name", "one two three four"), ("b", "five")], 24)
    assert told.split("\n") == ["a long name one two", "            three four", "b           five"]
    assert facts_as_text([("a", "one " * 30)], None).count("\n") == 0
    assert prose("Next: mlx-adapters train x", 10) == "Next: mlx-adapters train x"
