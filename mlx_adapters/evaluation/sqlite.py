"""Execution accuracy: a predicted query is right if it returns the gold query's rows.

The predicted SQL comes from a model, so it may be anything. It runs on a read-only copy of the database in
memory, where an authorizer allows nothing but reading, with limits on virtual-machine steps, rows and the
size of a value; whatever goes wrong counts as a wrong answer.
"""

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from mlx_adapters.errors import FormatError, NotFoundError

MAX_ROWS, MAX_VALUE_BYTES, MAX_SQL_BYTES = 10_000, 1_000_000, 10_000
STEPS_PER_CHECK, MAX_CHECKS = 10_000, 2_000  # 20 million steps: about a second
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FENCE = re.compile(r"```[ \t]*(?:sql\w*)?[ \t]*\n?(.*?)(?:```|$)", re.DOTALL | re.IGNORECASE)
# SQLite's lexical grammar (sqlite.org/lang.html): comments, strings, quoted names, words, single characters.
TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'?|"(?:[^"]|"")*"?|`(?:[^`]|``)*`?|\[[^\]]*\]?|[\w$]+|\S""", re.DOTALL
)


class Database:
    """An SQLite file, held in memory and only read.

    Raises NotFoundError or FormatError if the file is missing or is no database.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(f"There is no database '{path}'.", "name it: --score sqlite:FILE.")
        self._image = path.read_bytes()
        try:
            with closing(self._connect()) as connection:
                connection.execute("SELECT name FROM sqlite_master").fetchall()
        except sqlite3.Error as error:
            raise FormatError(f"'{path}' is not an SQLite database: {error}.") from None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:")
        if self._image:
            connection.deserialize(self._image)
        return connection

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows that one query returns. Raises ValueError or sqlite3.Error for any that may not or cannot run."""
        if len(sql.encode(errors="replace")) > MAX_SQL_BYTES:
            raise ValueError("the query is too long")
        checks = iter(range(MAX_CHECKS))
        with closing(self._connect()) as connection:  # a fresh copy: no query can leave anything behind
            connection.execute("PRAGMA query_only = ON")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
            connection.set_progress_handler(lambda: next(checks, None) is None, STEPS_PER_CHECK)
            connection.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY
            )
            rows = connection.execute(sql).fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise ValueError("the query returns too many rows")
        return rows


def extract_sql(answer: str) -> str:
    """The query in a model's answer: inside the first code fence if there is one, up to the first semicolon."""
    fenced = FENCE.search(answer)
    text = fenced[1] if fenced else answer
    end = next((token.start() for token in TOKEN.finditer(text) if token[0] == ";"), len(text))
    return text[:end].strip()


def is_ordered(sql: str) -> bool:
    """Whether the outermost query has ORDER BY: outside all parentheses, strings, names and comments."""
    depth, before = 0, ""
    for token in (match[0].upper() for match in TOKEN.finditer(sql)):
        if token.startswith(("--", "/*")):
            continue
        if depth == 0 and (before, token) == ("ORDER", "BY"):
            return True
        depth += (token == "(") - (token == ")")
        before = token
    return False


def same_rows(predicted: Iterable[tuple], gold: Iterable[tuple], ordered: bool) -> bool:
    """Whether two results are equal, as sequences if `ordered` and else as multisets. 3 equals 3.0."""
    a, b = ([tuple(_comparable(value) for value in row) for row in rows] for rows in (predicted, gold))
    return a == b if ordered else sorted(a) == sorted(b)


def _comparable(value: Any) -> tuple[str, Any]:
    """Values of any types, made sortable; floats to 12 digits, so that the order of summation does not count."""
    if isinstance(value, int | float):
        return "number", value if isinstance(value, int) else float(f"{value:.12g}")
    return type(value).__name__, value if value is not None else 0


def is_correct(answer: str, gold_sql: str, database: Database) -> bool:
    """Whether the query in `answer` returns the rows of `gold_sql`; their order counts if gold orders them.

    Raises FormatError if the gold query itself does not run.
    """
    try:
        gold = database.rows(gold_sql)
    except (ValueError, sqlite3.Error, sqlite3.Warning) as error:
        raise FormatError(f"The gold query does not run: {gold_sql!r}: {error}.") from None
    try:
        predicted = database.rows(extract_sql(answer))
    except (ValueError, sqlite3.Error, sqlite3.Warning, OverflowError, MemoryError):
        return False
    return same_rows(predicted, gold, ordered=is_ordered(gold_sql))
