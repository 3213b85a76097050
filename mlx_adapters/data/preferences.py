"""From preferences to tokens: an answer is tokenized like any row, and its trained tokens are what is judged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.tokenizing import Row, Tokenized, tokenize, tokenize_row
from mlx_adapters.errors import FormatError
from mlx_adapters.rows.preferences import OPENAI, SIDES
from mlx_adapters.rows.row import RawRow, columns_of
from mlx_adapters.rows.values import plain


def tokenize_preference(raw: RawRow, tokenizer: Any, config: TrainConfig) -> list[Row]:
    """The examples of one row, as the objective takes them: one pair, or labeled answers (of a pair, two).

    Raises FormatError, naming the line, for a row that gives none.
    """
    rejected, objective = raw.rejected, config.objective
    if objective.rows == "labeled":
        if rejected is None or "label" in raw.values:
            return [replace(_answer(raw, tokenizer, config), desirable=raw.label)]
        chosen, other = pair_of(raw, rejected, tokenizer, config)
        return [chosen, replace(other, desirable=False)]
    if rejected is None:
        has = ", ".join(map(repr, raw.values)) or "no column"
        hint = "'chosen' and 'rejected', with a 'prompt' or a common beginning."
        hint = "answers with a 'label' are for --objective kto." if "label" in raw.values else f"a pair has {hint}"
        raise FormatError(f"{raw.where}: the row has {has}, and no two answers to compare.", hint)
    chosen, other = pair_of(raw, rejected, tokenizer, config)
    if objective.likelihood and not config.mask_prompt:
        chosen = replace(chosen, trained=np.arange(len(chosen.tokens)) > 0)
    return [replace(chosen, rejected=other)]


def pair_of(chosen: RawRow, rejected: RawRow, tokenizer: Any, config: TrainConfig) -> Sequence[Row]:
    """Both answers of a row in tokens, with those marked that are judged."""
    if chosen.format != "text":
        return [_answer(raw, tokenizer, config) for raw in (chosen, rejected)]
    rows = [tokenize_row(raw, tokenizer, config.max_seq_length) for raw in (chosen, rejected)]
    most = min(len(row.tokens) for row in rows)
    differ = np.flatnonzero(rows[0].tokens[:most] != rows[1].tokens[:most])
    start = max(int(differ[0]) if len(differ) else most, 1)  # of whole texts: where their tokens part
    answers = [np.arange(len(row.tokens)) >= start for row in rows]
    return [replace(row, trained=answer, answer=answer) for row, answer in zip(rows, answers, strict=True)]


def _answer(raw: RawRow, tokenizer: Any, config: TrainConfig) -> Row:
    if raw.format == "text":
        raise FormatError(f"{raw.where}: the row has no prompt.", "give 'prompt', 'completion' and 'label'.")
    row = tokenize_row(raw, tokenizer, config.max_seq_length, mask_prompt=True, last_turn_only=config.last_turn_only)
    return replace(row, answer=row.trained)


def require_texts(rows: Sequence[RawRow]) -> None:
    """Raise FormatError, naming the line, for a row of two answers, or of one that is marked as a bad one."""
    for raw in rows:
        if raw.rejected is not None:
            first, other = SIDES if SIDES[0] in raw.values else OPENAI[1:]
            raise FormatError(
                f"{raw.where}: the row has '{first}' and '{other}', and sft learns one answer.",
                "give --objective dpo (or orpo, simpo, kto), or name the columns to learn.",
            )
        if raw.format != "text" and not columns_of(raw.read) and plain(raw.values.get("label")) is False:
            raise FormatError(
                f"{raw.where}: the row has a bad answer ('label' is false), and sft learns every answer.",
                "give --objective kto, or name the columns to learn.",
            )


def tokenize_for(rows: Sequence[RawRow], tokenizer: Any, config: TrainConfig) -> Tokenized:
    """The examples that a training takes from these rows.

    Raises FormatError, naming the line, for a row that the objective cannot use.
    """
    if config.objective.rows == "texts":
        require_texts(rows)
        return tokenize(
            rows,
            tokenizer,
            max_seq_length=config.max_seq_length,
            mask_prompt=config.mask_prompt,
            last_turn_only=config.last_turn_only,
        )
    kept: list[Row] = []
    dropped: list[str] = []
    unusable: list[str] = []
    for raw in rows:
        examples = tokenize_preference(raw, tokenizer, config)
        if why := raw.says_nothing:
            unusable.append(f"{raw.where}: {why}")
        elif all(row.can_be_trained for row in examples):
            kept += examples
        else:
            dropped.append(raw.where)
    return Tokenized(tuple(kept), tuple(dropped), tuple(unusable))
