"""Paths as people read and type them."""

import os
import shlex


def word(text: str | os.PathLike[str]) -> str:
    """What a shell takes as this one word; a path as short as it goes."""
    short = place(text) if os.path.isabs(text) else str(text)
    return shlex.quote(short if short == str(text) or os.sep in short else f"./{short}")  # never taken for a name


def place(path: str | os.PathLike[str]) -> str:
    """A path as people write it: an absolute one from here, or from their home, where that is shorter."""
    if not os.path.isabs(path):  # typed so, or a name or an id of the Hub
        return str(path)
    whole = os.path.abspath(path)
    shorter = [whole]
    for top, mark in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        inside = os.path.relpath(whole, top)
        if top != os.sep and not inside.startswith(os.pardir) and inside != os.curdir:
            shorter.append(mark + inside)
    return min(shorter, key=len)
