"""What becomes of one row: its tokens, what is trained of it, and which of its words no token stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_adapters.config.training import SFT, TrainConfig
from mlx_adapters.data.conversation import Conversation
from mlx_adapters.data.tokenizing import (
    Row,
    conversation_row,
    has_template,
    row_conversation,
    tokenize_row,
)
from mlx_adapters.rows.row import RawRow
from mlx_adapters.templates.traced import Leaf, leaves
from mlx_adapters.templates.tracing import NOT_SAID, Rendering, wrapped

CALL_TEXTS = ("name", "arguments")  # of a tool call; its id and type say nothing


@dataclass(frozen=True)
class LeftOut:
    """Text of a message that never reaches the model: the row, the message's number from 1, who speaks, the field, and
    the characters that the chat template leaves out."""

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
        rejected: of preferences, the pieces of the rejected answer; `pieces` are of the chosen one.
    """

    where: str
    pieces: tuple[tuple[str, bool], ...]
    turns: tuple[TurnReport, ...]
    left_out: tuple[LeftOut, ...]
    doubled_bos: bool
    rejected: tuple[tuple[str, bool], ...] = ()


def inspect_row(raw: RawRow, tokenizer: Any, training: TrainConfig) -> tuple[Row, RowReport]:
    """A row in tokens, as `tokenize_row` makes it, and what there is to see of it. Raises FormatError.

    Of preferences it is the chosen answer, with the answer's tokens marked.
    """
    if training.objective.rows != "texts":
        plain = replace(training, mask_prompt=raw.format != "text", objective=SFT())
        row, report = inspect_row(raw, tokenizer, plain)
        if (other := raw.rejected) is not None:
            report = replace(report, rejected=inspect_row(other, tokenizer, plain)[1].pieces)
        return row, report
    settings = {"mask_prompt": training.mask_prompt, "last_turn_only": training.last_turn_only}
    if raw.format == "text" or not has_template(tokenizer):
        row = tokenize_row(raw, tokenizer, training.max_seq_length, **settings)
        turns, left_out = [], []
    else:
        told = row_conversation(raw, tokenizer, **settings)
        row = conversation_row(raw, tokenizer, told, training.max_seq_length, training.mask_prompt)
        turns = [_turn_report(turn.message, turn.spans, turn.stops, len(row.tokens)) for turn in told.turns]
        left_out = list(texts_left_out(told, raw))
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = bos is not None and row.tokens[:2].tolist() == [bos, bos]
    return row, RowReport(raw.where, pieces(row, tokenizer), tuple(turns), tuple(left_out), doubled)


def _turn_report(message: int, spans: Sequence[tuple[int, int]], stops: bool, length: int) -> TurnReport:
    counted = sum(max(0, min(stop, length) - start) for start, stop in spans)
    return TurnReport(message + 1, counted, stops and spans[-1][1] <= length)


def pieces(row: Row, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The row's text, cut where training begins or ends."""
    borders = [0, *(np.flatnonzero(np.diff(row.trained.astype(int))) + 1).tolist(), len(row.tokens)]
    parts = [(a, b) for a, b in pairwise(borders) if a < b]
    return tuple((tokenizer.decode(row.tokens[a:b].tolist()), bool(row.trained[a])) for a, b in parts)


def texts_left_out(told: Conversation, raw: RawRow) -> Iterator[LeftOut]:
    """The texts of a row's messages that the chat template does not write."""
    joined = len(raw.messages) - len(told.messages)
    for turn, message in zip(wrapped(told.messages), raw.messages[joined:], strict=True):
        for leaf in leaves([turn]):
            if _is_said(leaf):
                for text in _missing(told, leaf):
                    yield LeftOut(raw.where, leaf.message + joined + 1, message["role"], str(leaf.path[0]), text)


def _is_said(leaf: Leaf) -> bool:
    field, *rest = leaf.path
    if field == "tool_calls":
        return any(part in CALL_TEXTS for part in rest)
    return field not in NOT_SAID and field != "tool_call_id"


def _missing(told: Conversation, leaf: Leaf) -> Iterator[str]:
    """The parts of a text that are not among the row's characters, and that the template did not write anew (it may
    take <think> apart and put it back)."""
    written = told.written
    if written is None:
        if leaf.text.strip() and leaf.text.strip() not in told.encoded.text:
            yield leaf.text.strip()
        return
    runs = [run for run in written.rendering.runs if run.leaf.message == leaf.message and run.leaf.text == leaf.text]
    if any(run.offset is None for run in runs):
        return
    covered = sorted(((run.offset or 0), (run.offset or 0) + run.stop - run.start) for run in runs)
    gaps, here = [], 0
    for start, stop in (*covered, (len(leaf.text), len(leaf.text))):
        gaps.append(leaf.text[here:start].strip())
        here = max(here, stop)
    if any(gaps):
        everywhere = (0, len(written.rendering.text)) if runs else (0, 0)
        anew = _template_text(written.rendering, *written.regions.get(leaf.message, everywhere))
        yield from (gap for gap in gaps if gap and gap not in anew)


def _template_text(rendering: Rendering, start: int, stop: int) -> str:
    """What the template itself wrote there; \\0 for the characters of messages."""
    characters = list(rendering.text)
    for run in rendering.runs:
        characters[run.start : run.stop] = "\0" * (run.stop - run.start)
    return "".join(characters[start:stop])
