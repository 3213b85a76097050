"""Bars and tables as text that fits a terminal's width, laid out by rich, which is loaded when the first is shown."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mlx_adapters.events import Progress
from mlx_adapters.units import columns, count, cut, duration, format_table, number

if TYPE_CHECKING:
    from rich.console import Console

BAR, LEAST_BAR, GAP, NARROW = 30, 4, 2, 12  # columns: of a bar, between cells, of a text that is folded
JOINED = "\ue000"  # stands for the space between a number and its unit, where no line ends


def bar(before: str, share: float, after: str, stream: TextIO, width: int, color: bool) -> str:
    """`before`, a bar of which `share` is full, and `after`, in one line of at most `width` columns.

    In a narrow terminal the bar gives way first, then the texts are cut.
    """
    from rich.progress_bar import ProgressBar

    room = min(BAR, width - columns(before) - columns(after) - 2)
    if room < LEAST_BAR:
        return cut(f"{before} {after}", width)
    drawn = _text(_console(stream, width, color), ProgressBar(total=1, completed=share, width=room))
    return f"{before} {drawn if color else drawn.ljust(room)} {after}"


def folded_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Iterable[int],
    stream: TextIO,
    width: int,
    color: bool,
    whole: bool = False,
) -> str:
    """A table of at most `width` columns: cells that are too long go on in the next line, and nothing is cut.

    `whole`: what is first in a row is to be copied, and stands in a line of its own if the others fit into one below.
    What is aligned right, numbers, is folded between words alone. Where there is no room for that, each row becomes a
    block with a line for each cell.
    """
    from rich.table import Table
    from rich.text import Text

    if whole and (named := _named_table(headers, rows, right, width)):
        return named
    console, flush = _console(stream, width, color), set(right)
    rows = [[re.sub(r"(?<=\d) (?=[kMGT]?B\b)", JOINED, cell) for cell in row] for row in rows]
    widths = _widths([headers, *rows], flush, width)
    if widths is None:
        table = Table.grid(padding=(0, GAP, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for number, row in enumerate(rows):
            if number:
                table.add_row(Text("", style="not bold"))
            for head, cell in zip(headers, row, strict=True):
                table.add_row(Text(head), Text(cell))
        return _stripped(_text(console, table))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for number, (head, room) in enumerate(zip(headers, widths, strict=True)):
        table.add_column(Text(head), justify="right" if number in flush else "left", width=room, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_wrapped(cell, room)) for cell, room in zip(row, widths, strict=True)))
    return _stripped(_text(console, table))


def _named_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int], width: int) -> str | None:
    others = [row[1:] for row in rows]
    lines = format_table(headers[1:], others, [column - 1 for column in right]).splitlines()
    text = "\n".join(
        f"{first}\n  {rest}" for first, rest in zip([headers[0], *(r[0] for r in rows)], lines, strict=True)
    )
    return text if max(map(columns, text.splitlines())) <= width else None


def _wrapped(cell: str, width: int) -> str:
    """The cell in lines, broken between words and after hyphens where that is possible."""
    return "\n".join(textwrap.wrap(cell, width)) if cell.isascii() and len(cell) > width else cell


def _stripped(text: str) -> str:
    """Without spaces at the ends of lines, colored ones too."""
    ends = re.compile(r"(?:[ ]|\x1b\[[\d;]*m)+$")
    lines = (ends.sub(lambda end: "\x1b[0m" if "\x1b" in end[0] and end.start() else "", x) for x in text.splitlines())
    return "\n".join(lines).replace(JOINED, " ")


def middle_out(text: str, length: int) -> str:
    """`text`, or its head and tail if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    head, tail = text[: 2 * length // 3], text[-(length // 3) :]
    return f"{head} … {len(text) - len(head) - len(tail):,} characters more … {tail}"


def prose(text: str, width: int) -> str:
    """Sentences in lines of at most `width` columns, broken between words; longer words, and commands, stay whole."""
    if "mlx-adapters " in text:  # to be copied
        return text
    return "\n".join(line if columns(line) <= width else _filled(line, width) for line in text.split("\n"))


def facts_as_text(pairs: Iterable[tuple[str, str]], width: int | None) -> str:
    """Names and what they are, the values one below the other, in lines of at most `width` columns."""
    rows = list(pairs)
    wide = max(len(name) for name, _ in rows) + 1
    lines = (name.ljust(wide) + value.replace("\n", " ") for name, value in rows)
    return "\n".join(line if width is None else _filled(line, width, " " * wide) for line in lines)


def _filled(line: str, width: int, under: str = "") -> str:
    under = under or " " * (len(line) - len(line.lstrip(" -")))
    start, rest = line[: len(under)], line[len(under) :]
    room = max(width - len(under), NARROW)
    parts = textwrap.wrap(rest, room, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join((under if number else start) + part for number, part in enumerate(parts)).rstrip()


def _widths(lines: Sequence[Sequence[str]], flush: set[int], width: int) -> list[int] | None:
    """How wide each column may be, the widest giving way; None if not all have the room that they need."""
    by_column = list(zip(*lines, strict=True))
    widths = [max(map(columns, cells)) for cells in by_column]
    words = [max(columns(word) for cell in cells for word in [*cell.split(), ""]) for cells in by_column]
    least = [words[i] if i in flush else min(full, NARROW) for i, full in enumerate(widths)]
    while sum(widths) + GAP * (len(widths) - 1) > width:
        able = [i for i, full in enumerate(widths) if full > least[i]]
        if not able:
            return None
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _console(stream: TextIO, width: int, color: bool) -> "Console":
    from rich.console import Console

    system = "standard" if color else None
    return Console(file=stream, width=width, force_terminal=color, color_system=system, no_color=not color)  # type: ignore[arg-type]


def _text(console: "Console", thing: Any) -> str:
    with console.capture() as captured:  # nothing is printed here
        console.print(thing, end="")
    return captured.get()


def pace(event: Progress, elapsed: float, anew: int) -> str:
    """How far it is, and how fast `anew` units were done in the time `elapsed`."""
    text = f"{event.done:,}/{count(event.total, event.unit) if event.unit else format(event.total, ',')}"
    if anew and elapsed > 0.5:
        rate = anew / elapsed
        text += f", {number(rate)}/s"
        if event.done < event.total:
            text += f", {duration((event.total - event.done) / rate + event.later)} left"
    return text
