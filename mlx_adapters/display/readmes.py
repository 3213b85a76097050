"""READMEs that are made here: what in one was made, and what somebody wrote.

A made README ends in a stamp, four hexadecimal digits for each of its lines; a part between two marks is the user's.
"""

import hashlib
import re

MINE = re.compile(r"<!-- yours\b.*?-->\n?(.*?)\n?<!-- /yours -->", re.S)
FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n?", re.S)
STAMP = re.compile(r"<!-- made: ([0-9a-f]*) -->")


def stamp(text: str) -> str:
    """What says of a README that the lines of `text` were made."""
    return f"<!-- made: {''.join(map(_mark, made_lines(text)))} -->"


def is_ours(text: str) -> bool:
    """Whether a README was made here: it has our marks, or what is left of them."""
    return bool(MINE.search(text) or STAMP.search(text))


def handwritten(text: str) -> str:
    """The user's part of a README; of one that was not made here, all of it below the front matter."""
    match = MINE.search(text)
    return (match[1] if match else "" if is_ours(text) else FRONT.sub("", text)).strip()


def made_lines(text: str) -> list[str]:
    """The lines of a README that are made anew each time: all but front matter, user's part and empty ones."""
    rest = STAMP.sub("", MINE.sub("", FRONT.sub("", text), count=1))
    return [line.rstrip() for line in rest.splitlines() if line.strip()]


def lines_by_hand(text: str) -> list[str]:
    """The lines outside the user's part that the stamp does not know."""
    mark = STAMP.search(text)
    made = set(re.findall("....", mark[1])) if mark else set()
    return [line for line in made_lines(text) if _mark(line) not in made]


def _mark(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:4]
