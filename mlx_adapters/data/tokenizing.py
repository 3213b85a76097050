"""From rows to tokens, with the tokens marked that the loss counts.

Without `mask_prompt` every token but the first is trained. With it only the assistant's tokens are: all of
its turns, or the last one (`last_turn_only`). A turn reaches from the first token after the generation prompt
to its end-of-turn tokens. Where a turn lies is found by rendering the conversation up to it and beyond it;
a template that renders earlier turns differently once later ones follow (Qwen 3 drops their reasoning) is
handled by putting another text in the turn's place and seeing which tokens change.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters.data.datasets import RawRow
from mlx_adapters.errors import FormatError

Tokens = list[int]


@dataclass(frozen=True)
class Row:
    """A row as the model sees it.

    `tokens`: (length,) int32. `trained`: (length,) bool, True where the token is a target of the loss
    (never the first). `full_length` counts the tokens before truncation.
    """

    tokens: np.ndarray
    trained: np.ndarray
    where: str
    full_length: int

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.full_length > len(self.tokens)

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts."""
        return int(self.trained.sum())


@dataclass(frozen=True)
class Tokenized:
    """Rows that have something to learn; `dropped` names the rows that lost all of it to truncation."""

    rows: tuple[Row, ...]
    dropped: tuple[str, ...]

    @property
    def truncated(self) -> int:
        """How many of the kept rows are cut at the length limit."""
        return sum(row.truncated for row in self.rows)


def tokenize(
    rows: Iterable[RawRow],
    tokenizer: Any,
    *,
    max_seq_length: int = 2048,
    mask_prompt: bool = False,
    last_turn_only: bool = False,
) -> Tokenized:
    """Tokenize rows and mark what the loss counts; rows longer than `max_seq_length` lose their end.

    Raises FormatError, naming the line, for a row that the chat template refuses.
    """
    kept, dropped = [], []
    for raw in rows:
        row = tokenize_row(raw, tokenizer, max_seq_length, mask_prompt=mask_prompt, last_turn_only=last_turn_only)
        kept.append(row) if row.trained.any() else dropped.append(row.where)
    return Tokenized(tuple(kept), tuple(dropped))


def tokenize_row(
    raw: RawRow, tokenizer: Any, max_seq_length: int = 2048, *, mask_prompt: bool = False, last_turn_only: bool = False
) -> Row:
    """One row as tokens and trained marks, cut to `max_seq_length`."""
    kind = raw.format
    if kind == "text":
        tokens, spans = _text(raw, tokenizer, mask_prompt)
    elif kind == "completion" and not _has_template(tokenizer):
        tokens, spans = _plain_completion(raw, tokenizer)
    else:
        tokens, spans = _chat(raw, tokenizer, mask_prompt, last_turn_only)
    trained = np.zeros(len(tokens), bool)
    for start, stop in spans if mask_prompt else [(0, len(tokens))]:
        trained[start:stop] = True
    trained[:1] = False
    cut = slice(max_seq_length)
    return Row(np.array(tokens[cut], np.int32), trained[cut], raw.where, len(tokens))


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))


def _with_end(tokens: Tokens, tokenizer: Any) -> Tokens:
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _text(raw: RawRow, tokenizer: Any, mask_prompt: bool) -> tuple[Tokens, list[tuple[int, int]]]:
    if mask_prompt:
        raise FormatError(
            f"{raw.where}: a text row has no prompt to mask.",
            "use prompt-completion or chat rows, or train without --mask-prompt.",
        )
    return _with_end(list(tokenizer.encode(raw.text)), tokenizer), []


def _plain_completion(raw: RawRow, tokenizer: Any) -> tuple[Tokens, list[tuple[int, int]]]:
    """Without a chat template a prompt and its completion are simply joined."""
    prompt = list(tokenizer.encode(raw.prompt))
    answer = list(tokenizer.encode(raw.completion, add_special_tokens=False))
    tokens = _with_end(prompt + answer, tokenizer)
    return tokens, [(len(prompt), len(tokens))]


def _chat(raw: RawRow, tokenizer: Any, mask_prompt: bool, last_turn_only: bool) -> tuple[Tokens, list[tuple[int, int]]]:
    if not _has_template(tokenizer):
        raise FormatError(
            f"{raw.where}: a chat row, but the tokenizer has no chat template.",
            "use an instruction-tuned base model, or text or prompt-completion rows.",
        )
    messages, render = messages_of(raw), _renderer(raw, tokenizer)
    try:
        tokens = render(messages, False)
    except Exception as error:
        raise FormatError(f"{raw.where}: the chat template refuses the row: {error}.") from None
    if not mask_prompt:
        return tokens, []
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise FormatError(f"{raw.where}: no assistant turn to train on.", "add one, or drop --mask-prompt.")
    ends = _end_tokens(tokenizer)
    turns = turns[-1:] if last_turn_only else turns
    return tokens, [_turn_span(tokens, messages, turn, render, ends, raw.where) for turn in turns]


def messages_of(raw: RawRow) -> list[dict[str, Any]]:
    """The conversation of a chat or prompt-completion row."""
    return raw.messages


Render = Callable[[Sequence[dict[str, Any]], bool], Tokens]


def _renderer(raw: RawRow, tokenizer: Any) -> Render:
    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> Tokens:
        return list(
            tokenizer.apply_chat_template(
                list(messages),
                tools=raw.tools,
                add_generation_prompt=generation_prompt,
                return_dict=False,
                **raw.template_arguments,
            )
        )

    return render


def _end_tokens(tokenizer: Any) -> set[int]:
    ends = set(getattr(tokenizer, "eos_token_ids", None) or ())
    return ends | set(getattr(tokenizer, "all_special_ids", None) or ()) | {tokenizer.eos_token_id}


def _turn_span(
    tokens: Tokens, messages: list[dict[str, Any]], turn: int, render: Render, ends: set[int], where: str
) -> tuple[int, int]:
    """[start, stop) of the assistant's turn in `tokens`."""
    span = _span_by_prefix(tokens, messages, turn, render)
    if span is None and isinstance(messages[turn].get("content"), str):
        span = _span_by_substitution(tokens, messages, turn, render, ends)
    if span is None:
        raise FormatError(
            f"{where}: the chat template does not show where message {turn + 1} lies.",
            "train without --mask-prompt, or with --last-turn-only.",
        )
    return span


def _span_by_prefix(
    tokens: Tokens, messages: list[dict[str, Any]], turn: int, render: Render
) -> tuple[int, int] | None:
    try:
        before = render(messages[:turn], True)
        last = turn + 1 == len(messages)
        after = tokens if last else render(messages[: turn + 1], False)
    except Exception:  # a template may refuse a conversation that stops here
        return None
    stable = tokens[: len(before)] == before and tokens[: len(after)] == after
    return (len(before), len(after)) if stable and len(after) > len(before) else None


def _span_by_substitution(
    tokens: Tokens, messages: list[dict[str, Any]], turn: int, render: Render, ends: set[int]
) -> tuple[int, int] | None:
    """Tokens that change when the turn's text does; two texts, in case one shares a token with it."""
    starts, stops = [], []
    for text in ("0", "zebra."):
        changed = [*messages]
        changed[turn] = {**messages[turn], "content": text}
        try:
            other = render(changed, False)
        except Exception:
            return None
        if other == tokens:
            continue
        start = _common(tokens, other)
        starts.append(start)
        room = min(len(tokens), len(other)) - start
        stops.append(len(tokens) - min(_common(tokens[::-1], other[::-1]), room))
    if not starts or min(starts) >= max(stops):
        return None
    start, stop = min(starts), max(stops)
    return start, stop + (stop < len(tokens) and tokens[stop] in ends)


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
