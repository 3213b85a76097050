"""Quantities and tables for people: the one place where numbers are rounded and get their units."""

import math
import re
from collections.abc import Iterable, Sequence


def format_table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """The table as text, two spaces between columns, no trailing spaces."""
    lines = [list(headers), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(columns(line[i]) for line in lines) for i in range(len(headers))]
    flush = set(right)

    def padded(cell: str, width: int, to_the_right: bool) -> str:
        space = " " * (width - columns(cell))
        return space + cell if to_the_right else cell + space

    def render(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(padded(cell, width, i in flush) for i, (cell, width) in enumerate(cells)).rstrip()

    return "\n".join(render(line) for line in lines)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: signs of East Asian scripts and emoji take two, accents none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """The beginning of a text that takes at most `width` columns."""
    if text.isascii():
        return text[:width]
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width)


def size(count: float | None) -> str:
    """Bytes in powers of 1000: "5.6 MB"."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 100 and unit != "B" else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def bytes_of(text: str) -> int:
    """The bytes that "12GB", "800 MB" or "12" (gigabytes) mean. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if match is None or not float(match[1]):
        raise ValueError(f"'{text}' is no amount of memory")
    power = " kmgt".index(match[2].lower() or ("g" if match[0].strip() == match[1] else " "))
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power)


def is_size(text: str) -> bool:
    """Whether `bytes_of` knows it."""
    try:
        return bytes_of(text) > 0
    except ValueError:
        return False


def count(number: int, thing: str) -> str:
    """ "1 layer", "1,200 layers", "3 batches"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "es" if thing.endswith(("ch", "s")) else "s")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; "-" for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"
