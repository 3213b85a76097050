"""Data sets: rows in up to three splits, from files, from the Hub or from Python.

A data set is a folder with `train.jsonl` (or .json, .csv, .parquet, in parts or compressed) and, if there are any,
`valid.*` (also `val`, `dev`, `validation`) and `test.*`; or one such file (all of it training rows); or
`hf:user/name` for a Hugging Face data set; or Python's own rows. What a row may look like is told in `rows.shapes`.
Every row knows where it came from, so that an error can name the line.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.rows import hub, objects
from mlx_adapters.rows.files import ELSEWISE, Located, read_file, suffix_of
from mlx_adapters.rows.row import DEFAULTS, RawRow, columns_of
from mlx_adapters.rows.shapes import ORDINARY, belongs
from mlx_adapters.rows.splits import NAMES, SAVED_BY_DATASETS, files_of, passed_over
from mlx_adapters.rows.values import is_missing
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.files import sha256
from mlx_adapters.storage.tensor_names import ROWS_FOLDER
from mlx_adapters.units import count

SPLITS = tuple(NAMES)
OF_ROWS = {"weight", "label"}  # columns that are used beside what a row says
PYTHON = "Python"  # the source of rows that no file holds
Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """The rows of "train", "valid" or "test", and the SHA-256 of what they came from.

    `notes`: what is worth a line. `everything`: the rows with those that are left out.
    """

    name: str
    rows: tuple[RawRow, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    everything: tuple[RawRow, ...] = field(default=(), repr=False)


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

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth a line: how rows of no ordinary shape are understood, and which are left out."""
        return tuple(dict.fromkeys(note for split in self.splits.values() for note in split.notes))

    def describe(self) -> dict[str, Any]:
        """What a recipe records: the source, and SHA-256 and row count of each split."""
        splits = {n: {"sha256": s.sha256, "rows": len(s.rows)} for n, s in self.splits.items()}
        return {"source": self.source, "splits": splits}


def _understood(name: str, rows: Sequence[RawRow]) -> list[str]:
    """In one line, how rows are understood and what of them is not used, if that needs saying."""
    shapes = Counter(row.canonical.shape for row in rows)
    used = {name for row in rows for name in row.canonical.used} | OF_ROWS
    filled = dict.fromkeys(name for row in rows for name, value in row.values.items() if _says_something(value))
    unused = [name for name in filled if name not in used]
    if len(shapes) < 2 and ORDINARY.issuperset(shapes) and not any(map(belongs, unused)):
        return []
    ignored = f"; not used: {', '.join(map(repr, unused[:6]))}{', ...' if unused[6:] else ''}" if unused else ""
    kinds = [f"{n:,} as {shape}" if len(shapes) > 1 else shape for shape, n in shapes.most_common()]
    return [f"Rows of {name} are read as {', '.join(kinds)}{ignored}."]


def _says_something(value: Any) -> bool:
    return not is_missing(value) and not (isinstance(value, str | list | tuple | Mapping) and not value)


# What a function that takes data accepts.
Data = str | Path | DataSet | Iterable[Mapping[str, Any]] | Mapping[str, Any]


def spread(rows: Sequence[Item], count: int) -> list[Item]:
    """`count` of the rows, evenly spaced; all if there are no more."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def read_data(source: Data, judging: bool = False, read: DataConfig = DEFAULTS) -> DataSet:
    """Read a data set from a folder, a file, the Hub (`hf:user/name`, which needs `datasets`) or Python's rows.

    It needs rows to train on; for `judging`, rows of any split will do. Raises NotFoundError when there is nothing,
    FormatError (naming the line) for a malformed row.
    """
    if isinstance(source, DataSet):
        return source
    if not isinstance(source, str | Path):
        splits = {name: _in_memory(name, rows, read) for name, rows in objects.located(source).items()}
        source = PYTHON
    elif str(source).startswith(hub.PREFIX):
        splits = {
            name: _in_memory(name, objects.rows(rows, f"{source}, {name} row"), read)
            for name, rows in hub.load(str(source)).items()
        }
    else:
        source = paths.expanded(source)
        splits = _read_local(source, read)
        if not (splits if judging else "train" in splits):
            raise _nothing_there(source, judging)
    if not any(split.rows for name, split in splits.items() if judging or name == "train"):
        what = "row" if judging else "training row"
        why = next((split.notes[-1] for split in splits.values() if split.notes), "give at least one.")
        raise FormatError(f"The data '{source}' has no {what}.", why)
    return DataSet(str(source), splits)


def read_as_trained(source: Data, own: DataConfig, judging: bool = False) -> DataSet:
    """Read a data set as an adapter's own was; columns that it does not have go by their usual names."""
    if isinstance(source, Iterator):
        source = tuple(source)
    try:
        return read_data(source, judging, own)
    except FormatError:
        if not columns_of(own):
            raise
        return read_data(source, judging, DataConfig(**vars(own.template)))


def read_split(path: Path, name: str = "train", read: DataConfig = DEFAULTS) -> Split:
    """Read one file of rows."""
    return _split(name, read_file(path), sha256(path), read)


def _read_local(path: Path, read: DataConfig) -> dict[str, Split]:
    if path.is_file():
        return {"train": read_split(path, read=read)}
    if not path.exists():
        raise NotFoundError(
            f"There is no data folder '{path}'.", f"a Hugging Face data set is written {hub.PREFIX}user/name."
        )
    if not path.is_dir():
        raise FormatError(f"'{path}' is neither a file nor a folder.", "write what a pipe gives into a file.")
    splits, found = {}, files_of(path)
    for name, parts in found.items():
        digests = [sha256(part) for part in parts]
        digest = digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        splits[name] = _split(name, [row for part in parts for row in read_file(part)], digest, read)
    others = passed_over(path, (part for parts in found.values() for part in parts))
    if splits and others:
        first = next(iter(splits))
        splits[first] = replace(splits[first], notes=(f"Not read in '{path}': {_shown(others)}.", *splits[first].notes))
    return splits


def _in_memory(name: str, rows: list[Located], read: DataConfig) -> Split:
    """A split of rows that no file of ours holds; its hash is that of the file that `kept_text` makes of it."""
    digest = hashlib.sha256(kept_text([RawRow(values, where) for values, where in rows]).encode()).hexdigest()
    return _split(name, rows, digest, read)


def keep(data: DataSet, folder: Path) -> None:
    """Write the rows that no file holds into a folder that `read_kept` reads."""
    if data.source == PYTHON:
        for name, split in data.splits.items():
            files.write_text(folder / ROWS_FOLDER / f"{name}.jsonl", kept_text(split.everything))


def read_again(source: str, folder: Path | None, judging: bool = False, read: DataConfig = DEFAULTS) -> DataSet:
    """The data that a record names as `source`; rows from Python are kept beside it, in `folder`. Raises as
    `read_data` does."""
    if source != PYTHON:
        return read_data(source, judging, read)
    if folder is None or not (folder / ROWS_FOLDER).is_dir():
        raise NotFoundError("The rows came from Python and are not here.", "give them again.")
    return replace(read_data(folder / ROWS_FOLDER, judging, read), source=PYTHON)


def kept_text(rows: Sequence[RawRow]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row.record, ensure_ascii=False) + "\n" for row in rows)


def _split(name: str, rows: list[Located], digest: str, read: DataConfig) -> Split:
    """The rows of a split, each of a known shape, without those whose `weight` is 0."""
    everything = [RawRow(values, where, read) for values, where in rows]
    weights = [row.weight for row in everything]
    if None in weights:  # a column of other numbers, somebody's own
        weights = [1] * len(everything)
    kept = tuple(row for row, weight in zip(everything, weights, strict=True) if weight)
    for row in kept:
        _ = row.format
    notes = _understood(name, kept)
    if left_out := len(everything) - len(kept):
        notes.append(f"{count(left_out, 'row')} of {name} left out: their weight is 0.")
    return Split(name, kept, digest, tuple(notes), tuple(everything))


def _nothing_there(folder: Path, judging: bool) -> NotFoundError:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    what = "rows" if judging else "train.jsonl"
    candidates = [name for name in names if suffix_of(Path(name)) and name not in SAVED_BY_DATASETS]
    hint = "it needs train.jsonl, .json, .csv or .parquet; valid.* and test.* are optional."
    if SAVED_BY_DATASETS.intersection(names):
        hint = "'datasets' saved it for itself: load_from_disk(...), then to_parquet('train.parquet')."
    elif below := [name for name in names if (folder / name).is_dir() and "train" in files_of(folder / name)]:
        hint = f"give one of its folders: {folder / below[0]}."
    elif candidates:
        file = folder / candidates[0]
        hint = f"give the file itself ({file}), or make the splits: mlx-adapters data split {file} FOLDER."
    elif others := [name for name in names if Path(name).suffix.lower() in ELSEWISE]:
        hint = f"of '{others[0]}': {ELSEWISE[Path(others[0]).suffix.lower()]}"
    return NotFoundError(
        f"The data folder '{folder}' has no {what}; {f'it holds {_shown(names)}' if names else 'it is empty'}.", hint
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def hold_out(data: DataSet, share: float, seed: int) -> DataSet:
    """A data set without validation rows, of whose training rows a share is set aside for that.

    Equal rows stay together, so no row of the one stands in the other.

    Args:
        data: it may have test rows.
        share: of the training rows, above 0 and below 1; at least one row.
        seed: of the choice.

    Raises ConfigError if there are validation rows, or too few rows.
    """
    require("valid" not in data.splits, f"The data '{data.source}' has validation rows.", "leave valid_fraction out.")
    train = data.splits["train"]
    parts = apart(train.rows, {"valid": share}, seed)
    require(bool(parts["train"]), f"The data '{data.source}' has too few different rows to hold some out.")
    new = {name: replace(train, name=name, rows=tuple(rows)) for name, rows in parts.items()}
    return DataSet(data.source, {**data.splits, **new})


def apart(rows: Sequence[RawRow], shares: Mapping[str, float], seed: int) -> dict[str, list[RawRow]]:
    """Rows in parts: "train", and of each share above 0 at least one row. Equal rows are in one part."""
    groups: dict[str, list[RawRow]] = {}
    for row in rows:
        groups.setdefault(row.key(), []).append(row)
    keys = [list(groups)[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    wanted = {name: max(1, round(share * len(rows))) if share else 0 for name, share in shares.items()}
    parts: dict[str, list[RawRow]] = {"train": [], **{name: [] for name in shares}}
    for key in keys:
        target = next((name for name, number in wanted.items() if len(parts[name]) < number), "train")
        parts[target] += groups[key]
    return parts
