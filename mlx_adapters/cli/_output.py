"""The only printer: data to stdout, talk to stderr.

Names, tags, templates, answers and other programs' error messages come from files that somebody else wrote, so no
control character of theirs reaches a terminal. Talk that cannot be written is lost and stops nothing; data that
cannot be written is an error.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import click

from mlx_adapters.cli._json import json_for
from mlx_adapters.cli._json import plain as plain  # the commands take it from here
from mlx_adapters.cli._places import carrying, shortened
from mlx_adapters.cli._places import place as place
from mlx_adapters.cli._places import word as word
from mlx_adapters.display.screen import facts_as_text, pace, prose
from mlx_adapters.display.screen import middle_out as middle_out
from mlx_adapters.errors import OutputLostError
from mlx_adapters.events import Event, Note, Progress
from mlx_adapters.units import columns as text_columns
from mlx_adapters.units import cut, format_table
from mlx_adapters.units import duration as duration  # the commands take them from here
from mlx_adapters.units import number as number
from mlx_adapters.units import size as size

SCHEMA = "mlx_adapters/1"  # of the --json documents; fields may be added, any other change counts up (docs/json.md)

# Escape sequences whole, then what is left of control characters but tab and newline, and what turns the direction.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|"
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
_LINE_ENDS = re.compile(r"[\t\n\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029]+")
_OUR_ESCAPE = os.urandom(8).hex()  # stands for ESC in what `style` gives: no text from elsewhere can hold it

# Loggers of what happens below functions that are given no on_event; what they say is a note.
TOLD = tuple(
    f"mlx_adapters.{n}" for n in ["events", "hub", "storage.locks", "models.quantized_check", "generation.live"]
)

_quiet = False
_debug = False
_told = set[str]()  # what was logged: each sentence is printed once
_said = False  # whether anything was printed yet
_line_open = False  # whether the terminal stands in a live line


def configure(quiet: bool, debug: bool) -> None:
    """Set what the global options ask for."""
    global _quiet, _debug
    _quiet, _debug = quiet, debug
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    _told.clear()
    for name in TOLD:
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        log.handlers = [_NoteHandler()]


def open_streams() -> None:
    """Make the standard streams fit to be used, whatever the caller left: closed, or of another encoding."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take its number, and get what is printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a file
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")  # type: ignore[union-attr]


def flush() -> None:
    """Write what is still held back of stdout. Raises StorageError."""
    with _data():
        sys.stdout.flush()


def discard() -> None:
    """Let what is still held back of the streams go nowhere: they cannot be written, and Python would say so again."""
    with contextlib.suppress(OSError):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _data() -> Iterator[None]:
    """Around what writes data: a reader that went away stays BrokenPipeError, any other refusal is OutputLostError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise OutputLostError(f"Standard output cannot be written: {why}.") from None


def printable(text: str, line: bool = False) -> str:
    """`text` without what would steer a terminal; with `line`, in one line."""
    if line:
        text = _LINE_ENDS.sub(" ", text)
    return _CONTROLS.sub("", text)


class _NoteHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in _told:
            _told.add(text)
            (warn if record.levelno >= logging.WARNING else note)(text)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return _debug


def live() -> bool:
    """Whether a live line can be shown: not --quiet, and a terminal that can go back in its line."""
    return not _quiet and _redraws()


def _redraws() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def heard() -> bool:
    """Whether somebody sits at a terminal and wants to be told things."""
    return not _quiet and sys.stderr.isatty()


def columns() -> int:
    """The terminal's width, 80 where there is none."""
    return shutil.get_terminal_size().columns


def colored(stream: Any) -> bool:
    """Whether colors make sense: a terminal, and NO_COLOR not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, stream: Any = None, **how: Any) -> str:
    """`text` in color if the stream (default stdout) is a terminal."""
    text = printable(text)
    return click.style(text, **how).replace("\x1b", _OUR_ESCAPE) if colored(stream or sys.stdout) else text


def out(text: str = "", newline: bool = True) -> None:
    """Data, to stdout. Raises StorageError where it cannot be written."""
    global _said
    _said = True
    if _line_open and sys.stdout.isatty():
        _talk("", newline=False)  # takes away the live line of what ended before its time
    with _data():
        click.echo(_styled(printable(text)), nl=newline)


def say(text: str) -> None:
    """Sentences about the data, to stdout; on a terminal no word is broken."""
    out(_fitted(text, sys.stdout))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, to stdout, the values one below the other."""
    out(facts_as_text(pairs, columns() if sys.stdout.isatty() else None))


def _fitted(text: str, stream: Any) -> str:
    return prose(shortened(text), columns()) if stream.isatty() else shortened(text, home=False)


def _styled(text: str) -> str:
    return text.replace(_OUR_ESCAPE, "\x1b")


def _talk(text: str, newline: bool = True, clear: bool = True, live: bool = False) -> None:
    global _line_open, _said
    _line_open, _said = live, True
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody listens, or a signal came in a write
        click.echo(("\r\x1b[K" if clear and _redraws() else "") + _styled(printable(text)), nl=newline, err=True)


def note(text: str) -> None:
    """Talk, to stderr."""
    if not _quiet:
        _talk(_fitted(text, sys.stderr))


def next_steps(*lines: str) -> None:
    """What to type after this, to stderr; what the user named stands in it as `word` writes it."""
    for before, line in zip(("Next: ", *["      "] * len(lines)), lines, strict=False):
        note(before + carrying(line))


def note_inline(text: str) -> None:
    """Talk without an end of line (a prompt), to stderr."""
    _talk(text, newline=False, clear=False)


def warn(text: str) -> None:
    """A warning, to stderr."""
    _talk(style("Warning:", sys.stderr, fg="yellow") + _fitted("Warning: " + text, sys.stderr)[8:])


def error(message: str, hint: str | None = None) -> None:
    """An error and the next step, to stderr, each in one line."""
    _talk(style("Error: ", sys.stderr, fg="red") + printable(shortened(message), line=True))
    if hint:
        _talk(style("Hint: ", sys.stderr, fg="cyan") + printable(shortened(hint), line=True))


def usage(problem: click.ClickException) -> None:
    """What click says of a wrong command line, to stderr."""
    said = io.StringIO()
    problem.show(file=said)
    _talk(said.getvalue().rstrip("\n"))


def end_if_failed(failures: Iterable[str]) -> None:
    """End with status 1, after an error for each of several things that failed; the others are printed by now."""
    failed = list(failures)
    for failure in failed:
        error(failure)
    if failed:
        raise click.exceptions.Exit(1)


def emit_json(value: Any) -> None:
    """One JSON document, to stdout: a mapping or dataclass, and its schema's version. NaN and Inf become null."""
    text = json.dumps({"schema": SCHEMA} | plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with _data():
        click.echo(json_for(text, getattr(sys.stdout, "encoding", None) or "utf-8"))


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), whole: bool = False
) -> None:
    """A table to stdout; the columns in `right` are aligned right. Too wide for a terminal, it is folded there;
    `whole`: but for the first column, which is to be copied."""
    heads = [printable(head, line=True) for head in headers]
    lines = [[printable(str(cell), line=True) for cell in row] for row in rows]
    text = format_table(heads, lines, right)
    if sys.stdout.isatty() and max(map(text_columns, text.splitlines())) > columns():
        from mlx_adapters.display.screen import folded_table

        folded = folded_table(heads, lines, right, sys.stdout, columns(), colored(sys.stdout), whole)
        text = folded.replace("\x1b", _OUR_ESCAPE)
    out(text)


def progress(beside: Callable[[str], str] = lambda stage: "") -> Callable[[Event], None]:
    """An `on_event` that shows progress with rate and time left on stderr: a live line on a terminal, with what is to
    stand `beside` the stage, else a line every ten seconds."""
    started: dict[str, tuple[float, int]] = {}  # when each stage was first heard of, and what was done of it by then
    shown = [0.0]

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            (warn if event.level == "warning" else note)(event.text)
        elif isinstance(event, Progress) and not _quiet:
            now = time.monotonic()
            start, before = started.setdefault(event.stage, (now, event.done))
            last = event.done >= event.total
            if not last and now - shown[0] < (0.1 if _redraws() else 10):
                return
            shown[0] = now
            _show_progress(event, now - start, event.done - before, beside(event.stage))
            if last:
                del started[event.stage]  # another variant may come, with a pace of its own

    return on_event


def _show_progress(event: Progress, elapsed: float, anew: int, beside: str) -> None:
    """The event as a line; with a bar, where a terminal can go back in it and the stage is not over."""
    if event.done >= event.total or not _redraws():
        show_live(f"{event.stage}: {pace(event, elapsed, anew)}", end=event.done >= event.total)
        return
    from mlx_adapters.display.screen import bar

    before, after = (
        printable(f"{event.stage} {beside}".rstrip(), line=True),
        printable(pace(event, elapsed, anew), line=True),
    )
    line = bar(before, event.done / event.total, after, sys.stderr, columns() - 1, colored(sys.stderr))
    _talk(line.replace("\x1b", _OUR_ESCAPE), newline=False, live=True)


def show_live(text: str, end: bool = False) -> None:
    """Show `text` on the live line of the terminal; in a pipe, as a line."""
    if _quiet:
        return
    if _redraws():
        _talk(cut(printable(text, line=True), columns() - 1), newline=end, live=not end)
    else:
        _talk(text)


@contextlib.contextmanager
def never_silent(doing: str, seconds: float = 0.8) -> Iterator[None]:
    """A terminal is told what is being done where nothing was said of it for so long."""

    def tell() -> None:
        if not _said:
            show_live(f"{doing}: getting ready ...")

    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    if live():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave_interrupted() -> NoReturn:
    """End with 130, without Python's clearing up: MLX aborts where one of its threads is still at work."""
    _talk("Interrupted.")
    discard()
    os._exit(130)
