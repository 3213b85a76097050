"""What may be replaced: an earlier output of the same command, with nothing in it that is somebody else's.

Files and folders are replaced, never changed in place, which `read_whole` relies on.

A command says which files it writes. A folder that holds any other file is not replaced, nor is one that holds
what the command reads.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlx_adapters.errors import AdapterError, ExistsError, TrainingError
from mlx_adapters.storage.paths import TEMPORARY_PREFIX, is_litter, lies_in

SHOWN = 3
README = "README.md"
# A README made here ends in a stamp, four hexadecimal digits for each line; a part between two marks is the user's.
MINE = re.compile(r"<!-- yours\b.*?-->\n?(.*?)\n?<!-- /yours -->", re.S)
FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n?", re.S)
STAMP = re.compile(r"<!-- made: ([0-9a-f]*) -->")


@dataclass(frozen=True)
class Output:
    """The files of a folder that a command writes, by their paths in it: `mark` is always there, `also` is a pattern
    of the others. `any_readme`: it may have a README.md that came with what was taken in; `record`: its JSON file that
    holds the SHA-256 of such a one under "readme"."""

    mark: str = ""
    also: str = ""
    any_readme: bool = False
    record: str = ""

    def strangers(self, folder: Path) -> list[str]:
        """What is in `folder` besides these files and the system's litter; without the mark, all there is. A README.md
        in which somebody has written is a stranger."""
        known = re.compile(f"{re.escape(self.mark)}|{self.also}" if (folder / self.mark).is_file() else "")
        return [name for name in _files(folder) if not known.fullmatch(name) or self._is_written(folder / name)]

    def among(self, folder: Path) -> list[str] | None:
        """Its files in a folder that holds others, too, the mark at the end; None where there are no others."""
        known = re.compile(f"{re.escape(self.mark)}|{self.also}")
        there = _files(folder)
        own = sorted((name for name in there if known.fullmatch(name)), key=self.mark.__eq__)
        return None if len(own) == len(there) else own

    def _is_written(self, path: Path) -> bool:
        if path.name != README:
            return False
        try:
            text = path.read_text()
        except (OSError, ValueError):
            return True
        if not is_ours(text):
            return not self.any_readme and not self._came_along(path)
        return bool(handwritten(text) or lines_by_hand(text))

    def _came_along(self, readme: Path) -> bool:
        try:
            told = json.loads((readme.parent / self.record).read_bytes()) if self.record else {}
            return told["readme"] == hashlib.sha256(readme.read_bytes()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False


NOTHING = Output()


def refuse_existing(path: Path, overwrite: bool, ours: Output | None = None) -> None:
    """Raise ExistsError if `path` is there and may not be replaced (an empty folder may).

    ours: what the command writes into the folder; None for a command that writes one file.
    """
    if not os.path.lexists(path) or (ours is not None and _is_empty(path)):
        return
    if not overwrite:
        raise ExistsError(f"'{path}' already exists.", "choose another name, or pass --overwrite to replace it.")
    if not path.is_dir() if ours is not None else path.exists() and not path.is_file():  # a link to nothing may go
        kind = "not a folder" if ours is not None else "a folder, not a file" if path.is_dir() else "no file"
        raise ExistsError(f"'{path}' is {kind}, so it is no earlier output of this command.", "choose another place.")
    if ours is not None and (strangers := ours.strangers(path)):
        more = f" and {len(strangers) - SHOWN:,} more" if len(strangers) > SHOWN else ""
        lacks = "" if (path / ours.mark).exists() else f" (it has no {ours.mark})"
        raise ExistsError(
            f"'{path}' holds other things than this command writes{lacks}: {', '.join(strangers[:SHOWN])}{more}.",
            "choose another folder to write, or move them away.",
        )


def _files(folder: Path) -> list[str]:
    """The files and links below `folder`, by their paths in it, without litter and drafts."""
    inside: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY_PREFIX)]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        inside += [
            os.path.relpath(os.path.join(place, name), folder) for name in (*names, *links) if not is_litter(name)
        ]
    return sorted(inside)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and all(is_litter(name) for name in os.listdir(path))


def refuse_reading_inside(out: Path, reads: Iterable[object]) -> None:
    """Raise ExistsError if something that is read is `out` or lies inside it.

    reads: paths as the user spelled them, or what has a `folder`; None and ids of the Hub are passed over.
    """
    for read in reads:
        place = getattr(read, "folder", read)
        if place is not None and _lies_in(str(place), out):
            raise ExistsError(
                f"'{place}' is read, and would be replaced with '{out}'.", "choose another place to write."
            )


def refuse_writing_into(file: Path, reads: Iterable[object]) -> None:
    """Raise ExistsError if `file` is there and is one of `reads` (paths as the user spelled them) or lies in one."""
    for read in reads:
        if _lies_in(str(file), Path(str(read)).expanduser()):
            raise ExistsError(
                f"'{file}' would be written, and belongs to '{read}', which is read.", "name another file."
            )


def _lies_in(place: str, out: Path) -> bool:
    there = os.path.exists(os.path.expanduser(place)) and os.path.exists(out)  # an id of the Hub is not
    return there and lies_in(place, out)


def stat_of(path: Path) -> os.stat_result | None:
    """The file's facts, None for what cannot be reached."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def file_version(path: Path) -> tuple[int, ...] | None:
    """What is another once the file is replaced or changed; None for what cannot be reached."""
    stat = stat_of(path)
    return stat and (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


ATTEMPTS = 100
T = TypeVar("T")


def read_whole(folder: Path, names: tuple[str, ...], read: Callable[[], T]) -> T:
    """What `read` gives of a folder's files `names`, all from one version of them.

    Files and folders are replaced, never changed: what is there before and after is the same, or it is read again.
    Raises TrainingError if it never stays the same, and what `read` raises.
    """
    for _ in range(ATTEMPTS):
        before = _version(folder, names)
        try:
            value = read()
        except (AdapterError, OSError):
            if _version(folder, names) == before:
                raise
            continue
        if _version(folder, names) == before:
            return value
    raise TrainingError(f"'{folder}' keeps being changed while it is read.", "wait until that ends.")


def _version(folder: Path, names: tuple[str, ...]) -> list[tuple[int, ...] | None]:
    place = stat_of(folder)
    return [place and (place.st_dev, place.st_ino), *(file_version(folder / name) for name in names)]


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
