"""One file of rows: JSONL, JSON, CSV or Parquet, also compressed with gzip.

What a file is called says what it is, but for a JSONL file that is called `.json` and a list that is called `.jsonl`.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.rows.values import require_unicode

Values = Mapping[str, Any]
Located = tuple[Values, str]  # the values of a row, and the place where it stands
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}  # by their marks
GZIP = b"\x1f\x8b"
LARGE_FILE = b"version https://git-lfs.github.com/"  # how a stand-in of Git LFS begins
# Endings of files that are not read, and what to do with one.
ELSEWISE = {
    **dict.fromkeys((".zst", ".bz2", ".xz", ".zip", ".7z"), "unpack it; gzip alone (.gz) is read as it is."),
    **dict.fromkeys(
        (".arrow", ".feather"), "read it with 'datasets' or pyarrow, and write Parquet: to_parquet('train.parquet')."
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the table as CSV."),
    **dict.fromkeys((".txt", ".md"), 'make rows of it: {"text": "..."} on each line of a .jsonl file.'),
}
UNREADABLE = object()  # a value of Parquet that Python has no form for


def suffix_of(path: Path) -> str | None:
    """How a data file's name ends (".jsonl", ".csv.gz"), None if it is none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path) -> list[Located]:
    """The rows of a file. Raises NotFoundError, or FormatError that names the line."""
    if not path.is_file():
        raise NotFoundError(f"There is no data file '{path}'.")
    suffix = suffix_of(path)
    if suffix is None:
        hint = ELSEWISE.get(path.suffix.lower(), "rename or convert it.")
        raise FormatError(f"'{path}' is none of {', '.join(READERS)}.", hint)
    _require_whole(path)
    rows = READERS[suffix.removesuffix(".gz")](path)
    for values, where in rows:
        require_unicode(values, where)
    return rows


def _require_whole(path: Path) -> None:
    """Raise FormatError for what Git has in place of a large file that it did not fetch."""
    try:
        with path.open("rb") as stream:
            stands_in = stream.read(len(LARGE_FILE)) == LARGE_FILE
    except OSError:  # whoever reads it says why
        return
    if stands_in:
        raise FormatError(f"'{path}' stands in for a large file that Git LFS has not fetched.", "git lfs pull.")


def _jsonl(path: Path) -> list[Located]:
    text = _text(path)
    if text.lstrip()[:1] == "[":
        return _json(path)
    lines = text.rstrip().split("\n")
    if lines == [""]:
        return []
    return [(_parse_line(line, f"{path}, line {i}"), f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _json(path: Path) -> list[Located]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        first = text.lstrip()[:1]
        if first == "{" and getattr(error, "msg", "") == "Extra data":
            return _jsonl(path)
        raise FormatError(f"'{path}' is not JSON ({_why(error)}).", "a .json file holds a list of rows.") from None
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        if "messages" in values or "conversations" in values or not lists:
            values = [values]  # a single row
        elif len(lists) == 1:  # {"version": 1, "data": [...]}
            values = lists[0]
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise FormatError(
            f"'{path}' is not a list of rows.", "write [{...}, {...}], or a JSONL file with one object on each line."
        )
    return [(row, f"{path}, row {i}") for i, row in enumerate(values, 1)]


def _parse_line(line: str, where: str) -> Values:
    if not line.strip():
        raise FormatError(f"{where}: the line is empty.", "remove it; every line is one JSON object.")
    try:
        values = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a JSON object ({_why(error)}).", "every line is one JSON object.") from None
    if not isinstance(values, dict):
        raise FormatError(f"{where}: not a JSON object.", "every line is one JSON object in braces.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one key nobody knows which is meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} stands in it twice")
    return values


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.colno}" + (
            f" of line {error.lineno}" if error.lineno > 1 else ""
        )
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0].rstrip(".")


def _csv(path: Path) -> list[Located]:
    text = _text(path)
    header = text.split("\n", 1)[0]
    fewest = "\t" if suffix_of(path) in (".tsv", ".tsv.gz") else ","
    mark = fewest if fewest in header else next((other for other in ";\t" if other in header), fewest)
    limit = csv.field_size_limit(sys.maxsize)  # a field may hold a book
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        return _table(reader, path)
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num}: not CSV ({error}).", "is a quote missing?") from None
    finally:
        csv.field_size_limit(limit)


def _table(reader: Any, path: Path) -> list[Located]:
    names = [name.strip() for name in next(reader, [])]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise FormatError(f"'{path}' has two columns named '{twice[0]}'.", "the first line holds a name for each.")
    rows: list[Located] = []
    line = reader.line_num + 1  # where a row begins; it may have several
    for fields in reader:
        where, line = f"{path}, line {line}", reader.line_num + 1
        if not fields:
            continue
        if len(fields) != len(names):
            raise FormatError(
                f"{where}: {len(fields)} fields, where the first line names {len(names)} columns.",
                'a field with commas, quotes or line breaks stands in quotes: "...".',
            )
        rows.append((dict(zip(names, fields, strict=True)), where))
    return rows


def _parquet(path: Path) -> list[Located]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NotFoundError(
            f"Reading '{path}' needs pyarrow.", "pip install 'mlx_adapters[parquet]', or convert it to JSONL."
        ) from None
    try:
        table = pyarrow.parquet.read_table(path)
        names = table.column_names
        columns = [_column(column, pyarrow) for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FormatError(
            f"'{path}' is not a readable Parquet file: {' '.join(str(error).split())[:300].rstrip('.')}."
        ) from None
    if len(set(names)) < len(names):
        raise FormatError(f"'{path}' has two columns of one name.")
    rows = zip(*columns, strict=True) if columns else [()] * table.num_rows
    return [(dict(zip(names, row, strict=True)), f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def _column(column: Any, pyarrow: Any) -> Iterable[Any]:
    """A column as Python values. What Python has no form for (dates before Christ, nanoseconds) becomes text, or
    nothing that can be used: it may well be a column that nobody asks for."""
    try:
        return column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, ImportError):
        pass
    try:
        return column.cast(pyarrow.string()).to_pylist()
    except pyarrow.ArrowException:
        return [UNREADABLE] * len(column)


def _text(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 if it begins with its mark."""
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz") or data.startswith(GZIP):
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(
            f"'{path}' is not a whole gzip file: {str(error).rstrip('.')}.", "was it copied or downloaded whole?"
        ) from None
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FormatError(f"{path}, line {line}: not UTF-8 text.", "save the file as UTF-8.") from None


READERS: dict[str, Callable[[Path], list[Located]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS if suffix != ".parquet"))
