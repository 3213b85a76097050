"""Texts that know where their characters came from.

A `Traced` is a str whose operations (slices, sums, split, strip, ...) hand on the account of its characters. An
operation not thought of loses the account and changes no text: what comes out is the same str.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex


class Leaf(NamedTuple):
    """A text in a conversation: the message's number from 0, the path to it in the message, and the text."""

    message: int
    path: tuple[str | int, ...]
    text: str


# What a Traced holds: (length, source, offset) of each piece, without positions, so that pieces can be joined.
# The source is a Leaf, a Mark's (what, loop, number), or None for what the template wrote.
Piece = tuple[int, Any, int | None]


class Traced(str):
    """A str with the account of its characters."""

    __slots__ = ("_pieces",)
    _pieces: tuple[Piece, ...]

    def __new__(cls, text: str = "", pieces: tuple[Piece, ...] | None = None) -> "Traced":
        """`pieces` are as long as `text`; without them nothing is known of it."""
        made = super().__new__(cls, text)
        made._pieces = pieces_of(str(text)) if pieces is None else pieces
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return joined((self, other)) if type(other) in (str, Traced) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if type(other) in (str, Traced) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._cut(start, stop) if step == 1 else inherited(super().__getitem__(key), (self,))
        start = range(len(self))[key]  # or IndexError
        return self._cut(start, start + 1)

    def __iter__(self) -> Iterator[str]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def _cut(self, start: int, stop: int, marks: bool = False) -> str:
        """Characters [start, stop), with the marks before and after them if `marks`."""
        parts, here = [], 0
        for length, source, offset in self._pieces:
            low, high = max(here, start), min(here + length, stop)
            if low < high:
                parts.append((high - low, source, None if offset is None else offset + low - here))
            elif length == 0 and (marks or start <= here < stop):
                parts.append((0, source, offset))
            here += length
        return Traced(str.__getitem__(self, slice(start, max(start, stop))), tuple(parts))

    def strip(self, characters: str | None = None) -> str:
        """See str.strip."""
        start = len(self) - len(str.lstrip(self, characters))
        return self._cut(start, max(start, len(str.rstrip(self, characters))), marks=True)

    def lstrip(self, characters: str | None = None) -> str:
        """See str.lstrip."""
        return self._cut(len(self) - len(str.lstrip(self, characters)), len(self), marks=True)

    def rstrip(self, characters: str | None = None) -> str:
        """See str.rstrip."""
        return self._cut(0, len(str.rstrip(self, characters)), marks=True)

    def removeprefix(self, prefix: str) -> str:
        """See str.removeprefix."""
        return self._cut(len(prefix) if str.startswith(self, prefix) else 0, len(self), marks=True)

    def removesuffix(self, suffix: str) -> str:
        """See str.removesuffix."""
        return self._cut(0, len(self) - len(suffix) if str.endswith(self, suffix) else len(self), marks=True)

    def split(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str.split."""
        return self._cut_parts(str.split(self, separator, maxsplit))

    def rsplit(self, separator: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See str.rsplit."""
        parts = str.rsplit(self, separator, maxsplit)
        if separator is None:
            return self._cut_backwards(parts)
        return self._cut_parts(parts)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """See str.splitlines."""
        return self._cut_parts(str.splitlines(self, keepends))

    def partition(self, separator: str) -> tuple[str, str, str]:
        """See str.partition."""
        before, between, after = self._cut_parts(str.partition(self, separator))
        return before, between, after

    def rpartition(self, separator: str) -> tuple[str, str, str]:
        """See str.rpartition."""
        before, between, after = self._cut_parts(str.rpartition(self, separator))
        return before, between, after

    def _cut_parts(self, parts: Iterable[str]) -> list[str]:
        """The parts of this text that stand in it in this order."""
        cut, here = [], 0
        for part in parts:
            here = str.index(self, part, here)
            cut.append(self._cut(here, here + len(part)))
            here += len(part)
        return cut

    def _cut_backwards(self, parts: Sequence[str]) -> list[str]:
        cut, here = [], len(self)
        for part in reversed(parts):
            here = str.rindex(self, part, 0, here)
            cut.append(self._cut(here, here + len(part)))
        return cut[::-1]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """See str.replace."""
        if not old:
            return inherited(str.replace(self, old, new, count), (self,))
        parts = self.split(old, count)
        return joined([piece for part in parts for piece in (part, new)][:-1])

    def join(self, parts: Iterable[str]) -> str:
        """See str.join."""
        return join(self, parts)


def pieces_of(text: str) -> tuple[Piece, ...]:
    """The account of a text; all of it is the template's if it is a plain str."""
    if type(text) is Traced:
        return text._pieces
    return ((len(text), None, None),) if text else ()


def joined(parts: Iterable[str]) -> str:
    """The parts in a row, with their accounts."""
    parts = list(parts)
    text = "".join(parts)
    if not any(type(part) is Traced for part in parts):
        return text
    return Traced(text, tuple(piece for part in parts for piece in pieces_of(part)))


def join(separator: str, parts: Iterable[str]) -> str:
    """See str.join."""
    return joined([piece for part in parts for piece in (separator, part)][1:])


def inherited(result: Any, values: Iterable[Any]) -> Any:
    """A text that was made of others in a way that hands no account on: it came from the one message whose texts are
    among `values`. Anything else, also what came from several messages, is left as it is."""
    if type(result) is not str or not result:
        return result
    sources = list(leaves(values))
    if len({leaf.message for leaf in sources}) != 1:
        return result
    return Traced(result, ((len(result), sources[0], None),))


def leaves(values: Iterable[Any]) -> Iterator[Leaf]:
    """The texts of messages that are in the values, at any depth."""
    for value in values:
        if type(value) is Traced:
            yield from (source for _, source, _ in value._pieces if type(source) is Leaf)
        elif isinstance(value, Mapping):
            yield from leaves(value.values())
        elif isinstance(value, list | tuple):
            yield from leaves(value)
