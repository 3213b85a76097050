"""Regular expressions from strangers, matched in bounded time.

A PEFT config names modules by regular expressions, and Python's backtracking matcher can be made to run for
ages by a short one. Here the parsed expression is walked with the set of all positions reached so far
(Thompson, 1968), which is fast for all but absurd nesting, and that runs out of steps. Greedy and lazy
repeats match the same texts, so only back references and flags have to be refused.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from mlx_adapters.errors import FormatError

LONGEST, STEPS = 4000, 100_000
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda character: character.isalnum() or character == "_",
}


SIMPLER = "write the modules' paths themselves into adapter_config.json."


def full_match(pattern: str, text: str) -> bool:
    """Whether the whole of `text` matches, as `re.fullmatch` says.

    Raises FormatError for an expression that is invalid or of a kind that could run away.
    """
    try:
        return len(text) in _Walk(text).through(_parse(pattern), {0})
    except RecursionError:
        raise FormatError(f"The pattern '{pattern[:80]}...' is nested too deeply.", SIMPLER) from None


@functools.lru_cache(maxsize=512)
def _parse(pattern: str) -> Any:
    if len(pattern) > LONGEST:
        raise FormatError(f"A pattern of {len(pattern)} characters is too long: '{pattern[:40]}...'.", SIMPLER)
    try:
        parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, OverflowError, ValueError) as error:
        raise FormatError(f"'{pattern[:200]}' is not a regular expression: {error}.", SIMPLER) from None
    if parsed.state.flags & ~re.UNICODE:
        raise FormatError(f"The pattern '{pattern[:200]}' sets flags, which cannot be followed here.", SIMPLER)
    return parsed


class _Walk:
    """One text, walked by sets of positions; raises FormatError when the steps run out."""

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, STEPS

    def through(self, nodes: Any, at: set[int]) -> set[int]:
        """The positions where a match of `nodes` that starts at one of `at` can end."""
        for kind, value in nodes:
            if not at:
                break
            at = self._step(str(kind), value, at)
        return at

    def _step(self, kind: str, value: Any, at: set[int]) -> set[int]:
        self.steps -= 1
        if self.steps < 0:
            raise FormatError("A pattern takes too long to match.", "write it without nested repeats.")
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {i + 1 for i in at if i < len(self.text) and _accepts(kind, value, self.text[i])}
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            return self.through(value[3], at)
        if kind == "BRANCH":
            return set().union(*(self.through(branch, at) for branch in value[1]))
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(at, *value)
        if kind == "AT" and str(value) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at & {0}
        if kind == "AT" and str(value) in ("AT_END", "AT_END_STRING"):
            return at & {len(self.text)}
        if kind == "AT" and str(value) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            return {i for i in at if self._boundary(i) == (str(value) == "AT_BOUNDARY")}
        if kind in ("ASSERT", "ASSERT_NOT"):
            return {i for i in at if self._looks(i, *value) == (kind == "ASSERT")}
        raise FormatError(f"A pattern uses {kind.lower()}, which cannot be followed here.", SIMPLER)

    def _boundary(self, i: int) -> bool:
        around = [_CATEGORIES["CATEGORY_WORD"](c) for c in (self.text[i - 1 : i], self.text[i : i + 1])]
        return around[0] != around[1]

    def _looks(self, i: int, direction: int, body: Any) -> bool:
        starts = {i} if direction > 0 else set(range(i + 1))
        ends = self.through(body, starts)
        return bool(ends) if direction > 0 else i in ends

    def _repeat(self, at: set[int], least: int, most: int, body: Any) -> set[int]:
        # After more rounds than the text has positions, a body that can be empty reaches nothing new.
        rounds = len(self.text) + 1
        for _ in range(min(least, rounds)):
            at = self.through(body, at)
        reached, frontier = set(at), at
        for _ in range(min(most - least, rounds)):
            frontier = self.through(body, frontier) - reached
            if not frontier:
                break
            reached |= frontier
        return reached


def _accepts(kind: str, value: Any, character: str) -> bool:
    if kind == "ANY":
        return character != "\n"
    if kind == "LITERAL":
        return ord(character) == value
    if kind == "NOT_LITERAL":
        return ord(character) != value
    negated = str(value[0][0]) == "NEGATE"
    return any(_in_class(str(k), v, character) for k, v in value[negated:]) != negated


def _in_class(kind: str, value: Any, character: str) -> bool:
    if kind == "LITERAL":
        return ord(character) == value
    if kind == "RANGE":
        return value[0] <= ord(character) <= value[1]
    name = str(value).replace("_NOT_", "_")
    return _CATEGORIES[name](character) != ("_NOT_" in str(value))
