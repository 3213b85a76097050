"""Task scores: how right an answer is, from 0 to 1, given what was expected.

- `exact`: the texts are equal, white space aside.
- `regex:PATTERN`: what the pattern finds (its first group, if it has one) is the same in both.
- `sqlite[:FILE]`: both are queries and return the same rows; the data folder's only `.sqlite` file by default.
- `command:COMMAND`: a program reads {"answer", "expected", "row"} as JSON and prints a number; if it prints
  nothing, exit status 0 means 1 and any other 0.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError, FormatError, NotFoundError, did_you_mean
from mlx_adapters.evaluation.sqlite import Database, is_correct
from mlx_adapters.storage import paths

Score = Callable[[str, str, Mapping[str, Any]], float]
COMMAND_SECONDS = 60


def parse_score(text: str, data: str | Path) -> Score:
    """The score that `text` spells, for data in the folder `data`. Raises ConfigError or NotFoundError."""
    kind, _, detail = text.partition(":")
    if kind not in SCORES:
        raise ConfigError(f"There is no score '{kind}'.", did_you_mean(kind, SCORES, f"scores: {', '.join(SCORES)}."))
    return SCORES[kind](detail, Path(data))


def _exact(detail: str, data: Path) -> Score:
    if detail:
        raise ConfigError(f"'exact' takes no '{detail}'.")
    return lambda answer, expected, _: float(answer.split() == expected.split())


def _regex(detail: str, data: Path) -> Score:
    try:
        pattern = re.compile(detail)
    except re.error as error:
        raise ConfigError(f"'{detail}' is not a regular expression: {error}.") from None
    if not detail:
        raise ConfigError("'regex' needs a pattern.", "for example regex:'answer: (\\d+)'.")

    def find(text: str) -> str | None:
        match = pattern.search(text)
        return match and match[1 if pattern.groups else 0]

    return lambda answer, expected, _: float(find(answer) is not None and find(answer) == find(expected))


def _sqlite(detail: str, data: Path) -> Score:
    found = [Path(detail)] if detail else paths.visible(data, "*.sqlite")
    if len(found) != 1:
        raise NotFoundError(f"The data '{data}' has {len(found) or 'no'} .sqlite files.", "write sqlite:FILE.")
    database = Database(found[0])
    return lambda answer, expected, _: float(is_correct(answer, expected, database))


def _command(detail: str, data: Path) -> Score:
    try:
        command = shlex.split(detail)
    except ValueError as error:
        raise ConfigError(f"'{detail}' is not a command: {error}.") from None
    if not command:
        raise ConfigError("'command' needs a program.", "for example command:./grade.py.")

    def score(answer: str, expected: str, row: Mapping[str, Any]) -> float:
        question = json.dumps({"answer": answer, "expected": expected, "row": dict(row)})
        try:
            done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        except FileNotFoundError:
            raise NotFoundError(
                f"There is no program '{command[0]}' to score with.", "is it installed, and on the PATH?"
            ) from None
        except (subprocess.TimeoutExpired, PermissionError) as error:
            raise FormatError(f"The score command '{detail}' failed: {error}.") from None
        return _number(done.stdout, done.returncode, detail)

    return score


def _number(printed: str, status: int, command: str) -> float:
    if not printed.strip():
        return float(status == 0)
    try:
        value = float(printed.split()[-1])
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise FormatError(f"The score command '{command}' printed '{printed.strip()[:80]}', not a number from 0 to 1.")
    return value


SCORES: dict[str, Callable[[str, Path], Score]] = {
    "exact": _exact, "regex": _regex, "sqlite": _sqlite, "command": _command,
}  # fmt: skip
