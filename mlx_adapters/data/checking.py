"""What can be seen of a data set before it is trained on: counts, lengths, duplicates, overlaps, masks; and
splitting one file into train, valid and test."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.config.mapping import require
from mlx_adapters.config.settings import of_kind
from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.datasets import Data, DataSet, RawRow, apart, kept_text, read_data
from mlx_adapters.data.inspecting import LeftOut, RowReport, inspect_row
from mlx_adapters.data.preferences import require_texts, tokenize_for
from mlx_adapters.data.tokenizing import Row, has_words
from mlx_adapters.display.tables import Table, flat
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rows.files import read_file
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, paths, replacing
from mlx_adapters.units import count

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
SPLIT_OUTPUT = replacing.Output("train.jsonl", r"(valid|test)\.jsonl")


@dataclass(frozen=True)
class SplitReport:
    """One split.

    Args:
        rows: how many.
        formats: rows by format.
        tokens: in all rows, after truncation.
        trained_tokens: tokens that the loss counts.
        longest: tokens of the longest row, before truncation.
        median_length: likewise.
        histogram: (from, to, rows) of the lengths before truncation.
        truncated: rows that are cut.
        duplicates: rows that repeat an earlier one.
        empty_answers: rows in which the assistant says nothing, or does not speak.
        dropped: rows with nothing left to train.
        calls_only: rows whose only answers are tool calls.
        left_out: texts of messages that the chat template leaves out.
        turn_tokens: (least, median, most) trained tokens of a turn of the assistant's; None without such turns.
        turns: how many such turns.
        endless_turns: of these, how many end in no token that stops a generation.
        doubled_bos: rows that begin with two BOS tokens.
        control_tokens: rows whose messages spell special tokens, such as a turn's end, and which.
        outside_model: rows with tokens that the model has no row for.
        unknown_roles: messages by role, of roles that chat templates do not know; none of them is trained.
        unusable: preferences that say nothing, and why.
        changed: rows that the chat template takes only otherwise than they stand, and how.
    """

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
    calls_only: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    turn_tokens: tuple[int, float, int] | None
    turns: int
    endless_turns: int
    doubled_bos: tuple[str, ...]
    control_tokens: tuple[str, ...]
    outside_model: tuple[str, ...]
    unknown_roles: dict[str, int]
    unusable: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class DataReport(Table):
    """A whole data set. `overlaps` counts rows of valid and test that also stand in train; `shown` is a training row
    as the model sees it, the first unless another was asked for, and `first_row` its pieces of (text, whether the loss
    counts it). `stops`: whether any training row teaches the model to stop. `notes` say how rows were understood."""

    source: str
    splits: dict[str, SplitReport]
    overlaps: dict[str, int]
    first_row: tuple[tuple[str, bool], ...]
    shown: RowReport
    stops: bool
    notes: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """One for each split."""
        return [{"split": name} | flat(split) for name, split in self.splits.items()]


def check_data(data: Data, base: BaseLike, training: TrainConfig | None = None, row: int = 1) -> DataReport:
    """Look through a data set as `train` would see it with these settings.

    Args:
        data: as for `train`.
        base: the model whose tokenizer and chat template the rows go through.
        training: the settings, of which `objective`, `max_seq_length`, `mask_prompt` and `last_turn_only` matter here.
        row: the number from 1 of the training row to show.

    Raises NotFoundError, FormatError that names the first bad line, or ConfigError if there is no such row.

    Example:
        >>> report = ma.check_data("data/sql", "demo", ma.TrainConfig(mask_prompt=True))
        >>> report.splits["train"].rows
        12
    """
    training = of_kind(TrainConfig, training)
    resolved = resolve_base(base)
    tokenizer, dataset = load_tokenizer_of(resolved, training.template), read_data(data, read=training)
    rows = len(dataset.rows("train"))
    require(1 <= row <= rows, f"row {row} cannot be shown: the training data has {count(rows, 'row')}.")
    if training.objective.rows == "texts":
        for split in dataset.splits.values():
            require_texts(split.rows)
    seen = {
        name: [inspect_row(raw, tokenizer, training) for raw in split.rows] for name, split in dataset.splits.items()
    }
    splits = {name: _report(dataset.rows(name), looks, resolved) for name, looks in seen.items()}
    if training.objective.rows != "texts":
        for name, split in dataset.splits.items():
            done = tokenize_for(split.rows, tokenizer, training)
            splits[name] = replace(splits[name], dropped=done.dropped, unusable=done.unusable)
    train = seen["train"]
    stops = any(tokenized.stops for tokenized, _ in train)
    shown = train[row - 1][1]
    return DataReport(dataset.source, splits, _overlaps(dataset), shown.pieces, shown, stops, dataset.notes)


def _report(raws: Sequence[RawRow], seen: Sequence[tuple[Row, RowReport]], base: Base) -> SplitReport:
    rows, looks = [row for row, _ in seen], [look for _, look in seen]
    lengths = [row.full_length for row in rows] or [0]
    repeats = Counter(raw.key() for raw in raws)
    turns = [turn for look in looks for turn in look.turns]
    sizes = [turn.trained_tokens for turn in turns]
    return SplitReport(
        rows=len(rows),
        formats=dict(Counter(raw.format for raw in raws)),
        tokens=sum(len(row.tokens) for row in rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
        longest=max(lengths),
        median_length=float(np.median(lengths)),
        histogram=histogram(lengths),
        truncated=sum(row.truncated for row in rows),
        duplicates=sum(times - 1 for times in repeats.values()),
        empty_answers=tuple(raw.where for raw in raws if _empty_answer(raw)),
        dropped=tuple(row.where for row in rows if not row.trained.any()),
        calls_only=tuple(raw.where for raw in raws if _calls_only(raw)),
        left_out=tuple(text for look in looks for text in look.left_out),
        turn_tokens=(min(sizes), float(np.median(sizes)), max(sizes)) if sizes else None,
        turns=len(turns),
        endless_turns=sum(not turn.stops for turn in turns),
        doubled_bos=tuple(look.where for look in looks if look.doubled_bos),
        control_tokens=tuple(
            f"{look.where}: {', '.join(look.control_tokens)}" for look in looks if look.control_tokens
        ),
        outside_model=tuple(row.where for row in rows if base.lacks(row.tokens).size),
        changed=tuple(f"{look.where}: {change}" for look in looks for change in look.changes),
        unknown_roles=dict(Counter(role for raw in raws for role in _roles(raw) if role not in ROLES)),
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
    return not answers or any(not m.get("tool_calls") and not has_words(m) for m in answers)


def _roles(raw: RawRow) -> list[str]:
    return [message["role"] for message in raw.messages] if raw.format == "chat" else []


def _calls_only(raw: RawRow) -> bool:
    if raw.format != "chat":
        return False
    answers = [message for message in raw.messages if message["role"] == "assistant"]
    return bool(answers) and all(m.get("tool_calls") and not has_words(m) for m in answers)


def _overlaps(data: DataSet) -> dict[str, int]:
    train = {raw.key() for raw in data.rows("train")}
    return {name: sum(raw.key() in train for raw in data.rows(name)) for name in data.splits if name != "train"}


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
    rows = [RawRow(values, where) for values, where in read_file(paths.expanded(file))]
    parts = apart(rows, {"valid": valid, "test": test}, seed)
    require(bool(parts["train"]), f"'{file}' has too few different rows to split.")
    with files.atomic_folder(out, overwrite, SPLIT_OUTPUT) as folder:
        for name, part in parts.items():
            if part:
                files.write_text(folder / f"{name}.jsonl", kept_text(part))
    return {name: len(part) for name, part in parts.items()}
