"""What can be seen of a data set before it is trained on: counts, lengths, duplicates, overlaps, masks; and
splitting one file into train, valid and test."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.datasets import DataSet, RawRow, apart, kept_text, read_data
from mlx_adapters.data.tokenizing import Row, tokenize_row
from mlx_adapters.models.base import Base
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rows.files import read_file
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, paths, replacing

SPLIT_OUTPUT = replacing.Output("train.jsonl", r"(valid|test)\.jsonl")


@dataclass(frozen=True)
class SplitReport:
    """One split. `histogram` holds (from, to, rows) of the token lengths before truncation; `duplicates` counts
    rows that repeat an earlier one, `empty_answers` and `dropped` (nothing left to train) name rows."""

    rows: int
    formats: dict[str, int]
    tokens: int
    trained_tokens: int
    longest: int
    median_length: float
    histogram: tuple[tuple[int, int, int], ...]
    truncated: int
    duplicates: int
    empty_answers: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """A whole data set. `overlaps` counts rows of valid and test that also stand in train; `first_row` is the
    first training row as the model sees it: (text, whether the loss counts it) pieces."""

    source: str
    splits: dict[str, SplitReport]
    overlaps: dict[str, int]
    first_row: tuple[tuple[str, bool], ...]


def check_data(data: str | Path, base: str | Path | Base, training: TrainConfig | None = None) -> DataReport:
    """Look through a data set as `train` would see it with these settings.

    Args:
        data: a folder with train.jsonl and valid.jsonl, or one file.
        base: the model whose tokenizer and chat template the rows go through.
        training: the settings, of which `max_seq_length`, `mask_prompt` and `last_turn_only` matter here.

    Raises NotFoundError, or FormatError that names the first bad line.

    Example:
        >>> report = ma.check_data("data/sql", "demo", ma.TrainConfig(mask_prompt=True))
        >>> report.splits["train"].rows
        12
    """
    training = training or TrainConfig()
    resolved = resolve_base(base)
    tokenizer, dataset = load_tokenizer_of(resolved), read_data(data)
    rows = {name: [_tokens(raw, tokenizer, training) for raw in split.rows] for name, split in dataset.splits.items()}
    for row in (row for split in rows.values() for row in split):
        resolved.check_tokens(row.tokens, row.where)
    splits = {name: _report(dataset.rows(name), rows[name]) for name in rows}
    return DataReport(dataset.source, splits, _overlaps(dataset), first_row(rows["train"][0], tokenizer))


def _tokens(raw: RawRow, tokenizer: Any, training: TrainConfig) -> Row:
    return tokenize_row(
        raw,
        tokenizer,
        training.max_seq_length,
        mask_prompt=training.mask_prompt,
        last_turn_only=training.last_turn_only,
    )


def _report(raws: Sequence[RawRow], rows: Sequence[Row]) -> SplitReport:
    lengths = [row.full_length for row in rows] or [0]
    seen = Counter(raw.key() for raw in raws)
    return SplitReport(
        rows=len(rows),
        formats=dict(Counter(raw.format for raw in raws)),
        tokens=sum(len(row.tokens) for row in rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
        longest=max(lengths),
        median_length=float(np.median(lengths)),
        histogram=histogram(lengths),
        truncated=sum(row.truncated for row in rows),
        duplicates=sum(count - 1 for count in seen.values()),
        empty_answers=tuple(raw.where for raw in raws if _empty_answer(raw)),
        dropped=tuple(row.where for row in rows if not row.trained.any()),
    )


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(from, to, count) in steps of doubling: 1-16, 17-32, 33-64, ..."""
    bars, low = [], 1
    while low <= max(lengths):
        high = 16 if low == 1 else 2 * (low - 1)
        bars.append((low, high, sum(low <= length <= high for length in lengths)))
        low = high + 1
    while bars and bars[0][2] == 0:
        bars.pop(0)
    return tuple(bars)


def _empty_answer(raw: RawRow) -> bool:
    if raw.format == "text":
        return not raw.text.strip()
    answers = [message for message in raw.messages if message["role"] == "assistant"]
    return not answers or any(not m["content"].strip() for m in answers if not m.get("tool_calls"))


def _overlaps(data: DataSet) -> dict[str, int]:
    train = {raw.key() for raw in data.rows("train")}
    return {name: sum(raw.key() in train for raw in data.rows(name)) for name in data.splits if name != "train"}


def first_row(row: Row, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The row's text, cut where training begins or ends."""
    borders = [0, *(np.flatnonzero(np.diff(row.trained.astype(int))) + 1).tolist(), len(row.tokens)]
    pieces = [(a, b) for a, b in pairwise(borders) if a < b]
    return tuple((tokenizer.decode(row.tokens[a:b].tolist()), bool(row.trained[a])) for a, b in pieces)


def split_data(
    file: str | Path, out: str | Path, *, valid: float = 0.1, test: float = 0.1, seed: int = 0, overwrite: bool = False
) -> dict[str, int]:
    """Split one file into a folder with train, valid and test (JSONL); the row counts.

    Equal rows stay together, so no row of valid or test stands in train.

    Args:
        file: the rows: .jsonl, .json, .csv or .parquet, also compressed (.gz).
        out: the folder to make.
        valid: share of the rows, from 0 to 1; a share above 0 gets at least one row.
        test: share of the rows, likewise.
        seed: of the shuffling.
        overwrite: replace an earlier split in `out`.

    Raises ConfigError, FormatError or ExistsError.

    Example:
        >>> ma.split_data("rows.jsonl", "data/mine", valid=0.25, test=0.25)
        {'train': 6, 'valid': 3, 'test': 3}
    """
    out = paths.expanded(out)
    replacing.refuse_existing(out, overwrite, SPLIT_OUTPUT)
    replacing.refuse_reading_inside(out, [file])
    require(0 <= valid < 1 and 0 <= test < 1 and valid + test < 1, "valid and test must be shares that leave a rest.")
    rows = [RawRow(values, where) for values, where in read_file(Path(file).expanduser())]
    parts = apart(rows, {"valid": valid, "test": test}, seed)
    require(bool(parts["train"]), f"'{file}' has too few different rows to split.")
    with files.atomic_folder(out, overwrite, SPLIT_OUTPUT) as folder:
        for name, part in parts.items():
            if part:
                files.write_text(folder / f"{name}.jsonl", kept_text(part))
    return {name: len(part) for name, part in parts.items()}
