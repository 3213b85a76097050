"""The only printer: data to stdout, talk to stderr."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from mlx_adapters.events import Event, Note, Progress
from mlx_adapters.units import count, duration, format_table, number
from mlx_adapters.units import size as size  # the commands take it from here

SCHEMA = "mlx_adapters/1"  # of the --json documents; fields may be added, any other change counts up (docs/json.md)

_quiet = False
_debug = False


def configure(quiet: bool, debug: bool) -> None:
    """Set what the global options ask for."""
    global _quiet, _debug
    _quiet, _debug = quiet, debug
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    log = logging.getLogger("mlx_adapters.hub")  # what happens below functions that take no on_event
    log.setLevel(logging.INFO)
    log.handlers = [_NoteHandler()]


class _NoteHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return _debug


def live() -> bool:
    """Whether a live line can be shown: not --quiet, and a terminal that can go back in its line."""
    return not _quiet and _redraws()


def _redraws() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """The terminal's width, 80 where there is none."""
    return shutil.get_terminal_size().columns


def colored(stream: Any) -> bool:
    """Whether colors make sense: a terminal, and NO_COLOR not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, stream: Any = None, **how: Any) -> str:
    """`text` in color if the stream (default stdout) is a terminal."""
    return click.style(text, **how) if colored(stream or sys.stdout) else text


def out(text: str = "", newline: bool = True) -> None:
    """Data, to stdout."""
    click.echo(text, nl=newline)


def note(text: str) -> None:
    """Talk, to stderr."""
    if not _quiet:
        _clear_line()
        click.echo(text, err=True)


def note_inline(text: str) -> None:
    """Talk without an end of line (a prompt), to stderr."""
    click.echo(text, nl=False, err=True)


def warn(text: str) -> None:
    """A warning, to stderr."""
    _clear_line()
    click.echo(style("Warning: ", sys.stderr, fg="yellow") + text, err=True)


def error(message: str, hint: str | None = None) -> None:
    """An error and the next step, to stderr."""
    _clear_line()
    click.echo(style("Error: ", sys.stderr, fg="red") + message, err=True)
    if hint:
        click.echo(style("Hint: ", sys.stderr, fg="cyan") + hint, err=True)


def end_if_failed(failures: Iterable[str]) -> None:
    """End with status 1, after an error for each of several things that failed; the others are printed by now."""
    failed = list(failures)
    for failure in failed:
        error(failure)
    if failed:
        raise click.exceptions.Exit(1)


def middle_out(text: str, length: int) -> str:
    """`text`, or its head and tail if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    head, tail = text[: 2 * length // 3], text[-(length // 3) :]
    return f"{head} … {len(text) - len(head) - len(tail):,} characters more … {tail}"


def emit_json(value: Any) -> None:
    """One JSON document, to stdout: a mapping or dataclass, and its schema's version. NaN and Inf become null."""
    click.echo(json.dumps({"schema": SCHEMA} | plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """A dataclass, path, tuple or number as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> None:
    """A plain table to stdout; the columns in `right` are aligned right."""
    out(format_table(headers, rows, right))


def progress() -> Callable[[Event], None]:
    """An `on_event` that shows progress with rate and time left on stderr: a live line on a terminal, else a
    line every ten seconds."""
    started: dict[str, float] = {}
    shown = [0.0]

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            (warn if event.level == "warning" else note)(event.text)
        elif isinstance(event, Progress) and not _quiet:
            now = time.monotonic()
            start = started.setdefault(event.stage, now)
            last = event.done >= event.total
            if not last and now - shown[0] < (0.1 if _redraws() else 10):
                return
            shown[0] = now
            show_live(_progress_text(event, now - start), end=last)
            if last:
                del started[event.stage]  # another variant may come, with a pace of its own

    return on_event


def _progress_text(event: Progress, elapsed: float) -> str:
    total = count(event.total, event.unit) if event.unit else f"{event.total:,}"
    text = f"{event.stage}: {event.done:,}/{total}"
    if event.done and elapsed > 0.5:
        rate = event.done / elapsed
        text += f", {number(rate)}/s"
        if event.done < event.total:
            text += f", {duration((event.total - event.done) / rate)} left"
    return text


def show_live(text: str, end: bool = False) -> None:
    """Show `text` on the live line of the terminal; in a pipe, as a line."""
    if _quiet:
        return
    if _redraws():
        sys.stderr.write("\r\x1b[K" + text[: columns() - 1] + ("\n" if end else ""))
        sys.stderr.flush()
    else:
        click.echo(text, err=True)


def _clear_line() -> None:
    if _redraws():
        sys.stderr.write("\r\x1b[K")


def leave_interrupted() -> NoReturn:
    """End with 130, without Python's clearing up: MLX aborts where one of its threads is still at work."""
    error("Interrupted.")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(130)
