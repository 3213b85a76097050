"""Bars and tables as text that fits a terminal's width, laid out by rich, which is loaded when the first is shown."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mlx_adapters.units import columns, cut

if TYPE_CHECKING:
    from rich.console import Console

BAR, LEAST_BAR, GAP, NARROW = 30, 4, 2, 12  # columns: of a bar, between cells, of a text that is folded


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
) -> str:
    """A table of at most `width` columns: cells that are too long go on in the next line, and nothing is cut.

    What is aligned right, numbers, is folded between words alone. Where there is no room for that, each row becomes a
    block with a line for each cell.
    """
    from rich.table import Table
    from rich.text import Text

    console, flush = _console(stream, width, color), set(right)
    widths = _widths([headers, *rows], flush, width)
    if widths is None:
        table = Table.grid(padding=(0, GAP, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for number, row in enumerate(rows):
            if number:
                table.add_row()
            for head, cell in zip(headers, row, strict=True):
                table.add_row(Text(head), Text(cell))
        return _stripped(_text(console, table))
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for number, (head, room) in enumerate(zip(headers, widths, strict=True)):
        table.add_column(Text(head), justify="right" if number in flush else "left", width=room, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return _stripped(_text(console, table))


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


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
