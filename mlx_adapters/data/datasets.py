"""Rows of training data as they lie on the disk, before any tokenizer sees them.

A data set is a folder with `train.jsonl` or `train.parquet` and, if there are any, `valid.*` and `test.*`;
or one such file (all of it training rows); or `hf:user/name` for a Hugging Face data set. What a row may look like
is told in `rows.shapes`. Every row knows where it came from, so that an error can name the line.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.rows.row import RawRow
from mlx_adapters.storage.files import sha256

SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
SUFFIXES = (".jsonl", ".parquet")
HUB_PREFIX = "hf:"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """The rows of "train", "valid" or "test", with the SHA-256 of the file they came from."""

    name: str
    rows: tuple[RawRow, ...]
    sha256: str


@dataclass(frozen=True)
class DataSet:
    """A data set: where it lies and its splits by name; "train" is there, unless it was read for judging alone."""

    source: str
    splits: Mapping[str, Split]

    def rows(self, split: str) -> tuple[RawRow, ...]:
        """The rows of one split, none if it does not exist."""
        return self.splits[split].rows if split in self.splits else ()

    @property
    def judging(self) -> str:
        """The split to judge by: test, else valid, else train."""
        return next(name for name in reversed(SPLITS) if self.rows(name))

    def describe(self) -> dict[str, Any]:
        """What a recipe records: the source, and SHA-256 and row count of each split."""
        splits = {n: {"sha256": s.sha256, "rows": len(s.rows)} for n, s in self.splits.items()}
        return {"source": self.source, "splits": splits}


def spread(rows: Sequence[Item], count: int) -> list[Item]:
    """`count` of the rows, evenly spaced; all if there are no more."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def read_data(source: str | Path, judging: bool = False) -> DataSet:
    """Read a data set from a folder, a file or the Hub (`hf:user/name`, which needs `datasets`).

    It needs rows to train on; for `judging`, rows of any split will do. Raises NotFoundError when there is nothing,
    FormatError (naming the line) for a malformed row.
    """
    if str(source).startswith(HUB_PREFIX):
        splits = _read_hub(str(source).removeprefix(HUB_PREFIX))
    else:
        source = Path(source).expanduser().absolute()
        splits = _read_local(source)
        if judging and not splits:
            raise NotFoundError(
                f"The data folder '{source}' has no rows.", "it needs test.jsonl, valid.jsonl or train.jsonl."
            )
        if not judging and "train" not in splits:
            raise NotFoundError(
                f"The data folder '{source}' has no train.jsonl.",
                "it needs train.jsonl or train.parquet; valid.* and test.* are optional.",
            )
    if not any(split.rows for name, split in splits.items() if judging or name == "train"):
        what = "row" if judging else "training row"
        raise FormatError(f"The data '{source}' has no {what}.", "put at least one row into train.jsonl.")
    return DataSet(str(source), splits)


def read_split(path: Path, name: str = "train") -> Split:
    """Read one JSONL or Parquet file."""
    if not path.is_file():
        raise NotFoundError(f"There is no data file '{path}'.")
    if path.suffix not in SUFFIXES:
        raise FormatError(f"'{path}' is neither a .jsonl nor a .parquet file.", "rename or convert it.")
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    for row in rows:
        _ = row.format
    return Split(name, tuple(rows), sha256(path))


def _read_local(path: Path) -> dict[str, Split]:
    if path.is_file():
        return {"train": read_split(path)}
    if not path.exists():
        raise NotFoundError(
            f"There is no data folder '{path}'.", f"a Hugging Face data set is written {HUB_PREFIX}user/name."
        )
    splits = {}
    for name, stems in SPLITS.items():
        there = [path / (stem + suffix) for stem in stems for suffix in SUFFIXES]
        there = [file for file in there if file.is_file()]
        if len(there) > 1:
            raise FormatError(f"Both '{there[0]}' and '{there[1]}' exist.", f"keep one file for {name}.")
        if there:
            splits[name] = read_split(there[0], name)
    return splits


def _read_jsonl(path: Path) -> list[RawRow]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        return []
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_line(line: bytes, where: str) -> RawRow:
    if not line.strip():
        raise FormatError(f"{where}: the line is empty.", "remove it; every line is one JSON object.")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a JSON object ({error}).", "every line is one JSON object.") from None
    if not isinstance(values, dict):
        raise FormatError(f"{where}: not a JSON object.", "every line is one JSON object in braces.")
    if b"\\ud" in line.lower():  # it may name half of a character
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            half = "the text holds half of a surrogate pair, which is no Unicode"
            raise FormatError(f"{where}: {half}.", "write the character whole, or leave it out.") from None
    return RawRow(values, where)


def _read_parquet(path: Path) -> list[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NotFoundError(
            f"Reading '{path}' needs pyarrow.", "pip install 'mlx_adapters[parquet]', or convert it to JSONL."
        ) from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"'{path}' is not a readable Parquet file: {error}.") from None
    return [RawRow(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _read_hub(name: str) -> dict[str, Split]:
    try:
        import datasets
    except ImportError:
        raise NotFoundError(f"The data set '{name}' needs the package 'datasets'.", "pip install datasets.") from None
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise NotFoundError(f"The data set '{name}' cannot be loaded: {error}.") from None
    splits = {}
    for split, names in SPLITS.items():
        dataset = next((loaded[n] for n in names if n in loaded), None)
        if dataset is not None:
            rows = tuple(RawRow(dict(r), f"{name}, {split} row {i}") for i, r in enumerate(dataset, 1))
            digest = hashlib.sha256("\n".join(row.key() for row in rows).encode()).hexdigest()
            splits[split] = Split(split, rows, digest)
    return splits
