"""What becomes of one row: its tokens, what is trained of it, and which of its words no token stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_adapters.config.training import SFT, TrainConfig
from mlx_adapters.data.conversation import left_out, special_words, tools_left_out
from mlx_adapters.data.preferences import pair_of
from mlx_adapters.data.tokenizing import (
    Row,
    RowConversation,
    conversation_row,
    has_template,
    row_conversation,
    tokenize_row,
)
from mlx_adapters.rows.row import RawRow


@dataclass(frozen=True)
class LeftOut:
    """Text of a message that never reaches the model: the row, the message's number from 1, who speaks, the field, and
    the characters that the chat template leaves out. Message 0: the row's tools, by name."""

    where: str
    message: int
    role: str
    field: str
    text: str


@dataclass(frozen=True)
class TurnReport:
    """A turn of the assistant's: the message's number from 1, how many of its tokens are trained, and whether the last
    of them stops a generation."""

    message: int
    trained_tokens: int
    stops: bool


@dataclass(frozen=True)
class RowReport:
    """A row as the model sees it.

    Args:
        where: the place of the row.
        pieces: the text, cut where training begins or ends, and of each piece whether the loss counts it.
        turns: the assistant's turns that are trained.
        left_out: what the chat template leaves out.
        doubled_bos: whether it begins with two BOS tokens.
        control_tokens: what the messages' texts hold that the tokenizer reads as special tokens, such as a turn's end.
        changes: what the chat template takes only otherwise than the row has it.
        rejected: of preferences, the pieces of the rejected answer; `pieces` are of the chosen one.
    """

    where: str
    pieces: tuple[tuple[str, bool], ...]
    turns: tuple[TurnReport, ...]
    left_out: tuple[LeftOut, ...]
    doubled_bos: bool
    control_tokens: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    rejected: tuple[tuple[str, bool], ...] = ()


def inspect_row(raw: RawRow, tokenizer: Any, training: TrainConfig) -> tuple[Row, RowReport]:
    """A row in tokens, as `tokenize_row` makes it, and what there is to see of it. Raises FormatError.

    Of preferences it is the chosen answer, with the answer's tokens marked.
    """
    if training.objective.rows != "texts":
        plain = replace(training, mask_prompt=raw.format != "text", objective=SFT())
        row, report = inspect_row(raw, tokenizer, plain)
        if (other := raw.rejected) is not None:
            row, rejected = pair_of(raw, other, tokenizer, training)
            report = replace(report, pieces=pieces(row, tokenizer), rejected=pieces(rejected, tokenizer))
        return row, report
    settings = {"mask_prompt": training.mask_prompt, "last_turn_only": training.last_turn_only}
    if raw.format == "text" or not has_template(tokenizer):
        row = tokenize_row(raw, tokenizer, training.max_seq_length, **settings)
        turns, lost, control = [], [], []
    else:
        told = row_conversation(raw, tokenizer, **settings)
        row = conversation_row(raw, tokenizer, told, training.max_seq_length, training.mask_prompt)
        turns = [
            _turn_report(told.origin(turn.message) or 0, turn.spans, turn.stops, len(row.tokens))
            for turn in told.conversation.turns
        ]
        lost = list(texts_left_out(told, raw))
        said = (value for message in raw.messages for value in message.values() if isinstance(value, str))
        control = [word for text in said for word in special_words(tokenizer).findall(text)]
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = bos is not None and row.tokens[:2].tolist() == [bos, bos]
    shown, words = pieces(row, tokenizer), tuple(dict.fromkeys(control))
    return row, RowReport(raw.where, shown, tuple(turns), tuple(lost), doubled, words, row.changes)


def _turn_report(message: int, spans: Sequence[tuple[int, int]], stops: bool, length: int) -> TurnReport:
    counted = sum(max(0, min(stop, length) - start) for start, stop in spans)
    return TurnReport(message + 1, counted, stops and spans[-1][1] <= length)


def pieces(row: Row, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The row's text, cut where training begins or ends."""
    borders = [0, *(np.flatnonzero(np.diff(row.trained.astype(int))) + 1).tolist(), len(row.tokens)]
    parts = [(a, b) for a, b in pairwise(borders) if a < b]
    return tuple((tokenizer.decode(row.tokens[a:b].tolist()), bool(row.trained[a])) for a, b in parts)


def texts_left_out(told: RowConversation, raw: RawRow) -> Iterator[LeftOut]:
    """The texts of a row's messages that the chat template does not write, and its tools if it tells of none."""
    if tools := tools_left_out(told.conversation):
        yield LeftOut(raw.where, 0, "", "tools", ", ".join(tools))
    for number, field, text in left_out(told.conversation):
        if (origin := told.origin(number)) is not None:
            yield LeftOut(raw.where, origin + 1, raw.messages[origin]["role"], field, text)
