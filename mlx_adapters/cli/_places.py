"""Paths and lines as people read and type them."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress

import click

CARRIED = "mlx_adapters.carried"  # in a context's meta: an option without which the next line would be refused


def word(text: str | os.PathLike[str]) -> str:
    """What a shell takes as this one word; a path as short as it goes."""
    short = place(text, home=True) if os.path.isabs(text) else str(text)
    return shlex.quote(short if short == str(text) or os.sep in short else f"./{short}")  # never taken for a name


def shortened(text: str, home: bool = True) -> str:
    """A text in which the absolute paths below here and, with `home`, below the home are as people write them."""
    for top, mark in _tops(home):
        if len(top) > 1:
            text = re.sub(rf"(?<![\w.~/-]){re.escape(top)}/(?=[^\s'/])", mark, text)
    return text


def _tops(home: bool) -> Iterator[tuple[str, str]]:
    """The folders that paths may begin at, and how that is written; here may have been removed."""
    with suppress(OSError):
        yield os.getcwd(), ""
    if home:
        yield os.path.expanduser("~"), "~/"


def place(path: str | os.PathLike[str], home: bool | None = None) -> str:
    """A path as people write it: an absolute one from here or, with `home`, from their home, where that is shorter.

    home: None: where stdout is a terminal, for a shell expands no ~ that it reads from a program.
    """
    home = sys.stdout.isatty() if home is None else home
    if not os.path.isabs(path):  # typed so, or a name or an id of the Hub
        return str(path)
    whole = os.path.abspath(path)
    shorter = [whole]
    for top, mark in _tops(home):
        inside = os.path.relpath(whole, top)
        if top != os.sep and not inside.startswith(os.pardir) and inside != os.curdir:
            shorter.append(mark + inside)
    return min(shorter, key=len)


def carrying(line: str) -> str:
    """A line to type next, with the option that this command was given and that one must be given too."""
    context = click.get_current_context(silent=True)
    flag = context.meta.get(CARRIED) if context else None
    if context is None or flag is None or flag in line:
        return line
    command: click.Command | None = context.find_root().command
    for name in line.split()[1:]:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(context, name)
    return f"{line} {flag}" if command and any(flag in param.opts for param in command.params) else line
