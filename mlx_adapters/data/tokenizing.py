"""From rows to tokens, with the tokens marked that the loss counts.

Without `mask_prompt` every token but the first is trained, turns of weight 0 apart. With it only what the model writes:
all turns of the assistant, or the last one (`last_turn_only`), from the end of the generation prompt to the token that
ends the turn. `data.conversation` finds them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_adapters.data.conversation import (
    Conversation,
    conversation,
    left_out,
    next_begins,
    refusing,
    stop_ids,
    tools_left_out,
)
from mlx_adapters.errors import FormatError
from mlx_adapters.models.model import prompt_tokens
from mlx_adapters.rows.row import RawRow
from mlx_adapters.templates.fitting import Fitted, rendered
from mlx_adapters.templates.tracing import NOT_SAID
from mlx_adapters.units import count

Tokens = list[int]


@dataclass(frozen=True)
class Row:
    """A row as the model sees it.

    `tokens`: (length,) int32. `trained`: (length,) bool, True where the token is a target of the loss
    (never the first). `full_length` counts the tokens before truncation. `stops`: whether a trained token is one that
    stops a generation. `left_out`: what the chat template leaves out of turns that are to be trained, as (message from
    1, field), and (0, "tools") if the model is told of none of the row's. `changes`: what the template takes only
    otherwise than it stands (`templates.fitting`). `unheard`: the messages of others of which the template leaves out
    words, as (message from 1, role), where the prompt is masked.
    Of a preference: `answer`, (length,) bool, the tokens whose log-probability is judged; `rejected`, the other row of
    a pair; `desirable`, an answer's label.
    """

    tokens: np.ndarray
    trained: np.ndarray
    where: str
    full_length: int
    stops: bool = True
    left_out: tuple[tuple[int, str], ...] = ()
    changes: tuple[str, ...] = ()
    unheard: tuple[tuple[int, str], ...] = ()
    answer: np.ndarray | None = None
    rejected: "Row | None" = None
    desirable: bool = True

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.full_length > len(self.tokens)

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts."""
        return int(self.trained.sum())

    @property
    def sequences(self) -> "tuple[Row, ...]":
        """What the model reads: this row, or both rows of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def can_be_trained(self) -> bool:
        """Whether there is a token to learn, and of a preference one of each answer."""
        return all((row.trained if row.answer is None else row.answer).any() for row in self.sequences)

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return max(len(row.tokens) for row in self.sequences)


@dataclass(frozen=True)
class Tokenized:
    """Rows that have something to learn; `dropped` names the rows that lost all of it to truncation. `unusable`:
    preferences that say nothing, and why."""

    rows: tuple[Row, ...]
    dropped: tuple[str, ...]
    unusable: tuple[str, ...] = ()

    @property
    def truncated(self) -> int:
        """How many of the kept rows are cut at the length limit."""
        return sum(any(part.truncated for part in row.sequences) for row in self.rows)

    def remarks(self, row: str, limit: str) -> Iterator[str]:
        """What became of rows otherwise than one might think, as sentences. `row`: what one is called, "train row";
        `limit`: of their length."""
        if self.truncated:
            yield f"{count(self.truncated, row)} cut at {limit}."
        if self.dropped:
            named = ", ".join(self.dropped[:3])
            yield f"{count(len(self.dropped), row)} with nothing to train within {limit}, or of weight 0: {named}."
        if self.unusable:
            yield f"{count(len(self.unusable), row)} left out: {'; '.join(self.unusable[:3])}."
        sequences = [part for kept in self.rows for part in kept.sequences]
        for field in dict.fromkeys(name for part in sequences for _, name in part.left_out):
            places = {part.where: message for part in sequences for message, name in part.left_out if name == field}
            named = "; ".join(f"{where}, message {i}" if i else where for where, i in list(places.items())[:3])
            what = f"'{field}' of the assistant's, of which the chat template leaves out some or all"
            what = "tools that the chat template does not tell the model of" if field == "tools" else what
            yield f"{count(len(places), row)} with {what}: {named}."
        for role in dict.fromkeys(name for part in sequences for _, name in part.unheard):
            places = {part.where: message for part in sequences for message, name in part.unheard if name == role}
            named = "; ".join(f"{where}, message {i}" for where, i in list(places.items())[:3])
            yield f"{count(len(places), row)} with words of '{role}' that the chat template leaves out: {named}."
        for change in dict.fromkeys(change for part in sequences for change in part.changes):
            changed = list(dict.fromkeys(part.where for part in sequences if change in part.changes))
            why = "put otherwise, since the chat template refuses it as it stands"
            yield f"{count(len(changed), row)} {why} ({change}): {'; '.join(changed[:3])}."


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
        kept.append(row) if row.can_be_trained else dropped.append(row.where)
    return Tokenized(tuple(kept), tuple(dropped))


def tokenize_row(
    raw: RawRow, tokenizer: Any, max_seq_length: int = 2048, *, mask_prompt: bool = False, last_turn_only: bool = False
) -> Row:
    """One row as tokens and trained marks, cut to `max_seq_length`."""
    if raw.format == "text":
        return _cut(raw, tokenizer, max_seq_length, _text(raw, tokenizer, mask_prompt))
    if raw.format == "completion" and not has_template(tokenizer):
        tokens, trained = _plain_completion(raw, tokenizer)
        return _cut(raw, tokenizer, max_seq_length, tokens, trained if mask_prompt else None)
    if mask_prompt:
        return conversation_row(raw, tokenizer, row_conversation(raw, tokenizer, last_turn_only), max_seq_length)
    if raw.silent:
        return conversation_row(
            raw, tokenizer, row_conversation(raw, tokenizer, mask_prompt=False), max_seq_length, False
        )
    form, tokens = _plain_conversation(raw, tokenizer)
    if form.changes or raw.tools or any(map(_may_be_left_out, raw.messages)):
        with suppress(FormatError):  # a tokenizer that does not tell which characters its tokens stand for
            told = row_conversation(raw, tokenizer, mask_prompt=False)
            return conversation_row(raw, tokenizer, told, max_seq_length, mask_prompt=False)
    return _cut(raw, tokenizer, max_seq_length, tokens)


@dataclass(frozen=True)
class RowConversation:
    """A row's conversation in the form that the chat template takes."""

    form: Fitted
    conversation: Conversation

    def origin(self, number: int) -> int | None:
        """The number in the row of the message that the template was given under this one; None for one of ours."""
        return max(self.form.origins[number], default=None)


def conversation_row(
    raw: RawRow, tokenizer: Any, told: RowConversation, max_seq_length: int = 2048, mask_prompt: bool = True
) -> Row:
    """A row whose conversation is known, cut to `max_seq_length`."""
    said = told.conversation
    missing = left_out(said, [turn.message for turn in said.turns])
    lost = dict.fromkeys(((told.origin(number) or 0) + 1, field) for number, field, _ in missing)
    if tools_left_out(said):
        lost[0, "tools"] = None
    others = [number for number, message in enumerate(said.messages) if mask_prompt and message["role"] != "assistant"]
    unheard = dict.fromkeys(
        ((told.origin(number) or 0) + 1, str(said.messages[number]["role"])) for number, _, _ in left_out(said, others)
    )
    marks = said.trained if mask_prompt else _all_but_silent(raw, tokenizer, told)
    row = _cut(raw, tokenizer, max_seq_length, said.tokens, marks)
    return replace(row, left_out=tuple(lost), unheard=tuple(unheard), changes=told.form.changes)


def _all_but_silent(raw: RawRow, tokenizer: Any, told: RowConversation) -> np.ndarray | None:
    """(tokens,) bool: all but what the model says in turns of weight 0; None where there are none."""
    silent = [i for i, origin in enumerate(told.form.origins) if raw.silent.intersection(origin)]
    return None if not silent else ~_conversation(raw, tokenizer, told.form, silent).trained


def _conversation(raw: RawRow, tokenizer: Any, form: Fitted, turns: Sequence[int]) -> Conversation:
    arguments = raw.template_arguments
    return conversation(
        form.messages, tokenizer, raw.where, tools=form.tools, template_arguments=arguments, turns=turns
    )


def _cut(
    raw: RawRow,
    tokenizer: Any,
    length: int,
    tokens: Sequence[int] | np.ndarray,
    trained: np.ndarray | None = None,
) -> Row:
    marks = np.ones(len(tokens), bool) if trained is None else trained.copy()
    marks[:1] = False
    ids = np.array(
        tokens[:length], np.int64
    )  # a broken tokenizer's may be too large; whoever has the model refuses them
    kept, marks = np.minimum(ids, np.iinfo(np.int32).max).astype(np.int32), marks[:length]
    stops = not stop_ids(tokenizer).isdisjoint(kept[marks].tolist())
    return Row(kept, marks, raw.where, len(tokens), stops)


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))


def row_conversation(
    raw: RawRow, tokenizer: Any, last_turn_only: bool = False, mask_prompt: bool = True
) -> RowConversation:
    """A chat or completion row, with the turns marked that are trained (see `conversation`).

    Turns of weight 0 are not. Raises FormatError for a row that the template refuses, and with `mask_prompt` for one
    that has no turn of the assistant's, or whose answers the template leaves out.
    """
    _require_template(raw, tokenizer)
    messages = raw.messages
    if mask_prompt and all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in messages))
        hint = "the role of what is trained is 'assistant'; or drop --mask-prompt."
        raise FormatError(f"{raw.where}: no assistant turn to train on, only {roles}.", hint)

    def render(form: Fitted) -> Conversation:
        turns = [i for i, message in enumerate(form.messages) if message["role"] == "assistant"]
        turns = [i for i in (turns[-1:] if last_turn_only else turns) if all(raw.weights[k] for k in form.origins[i])]
        return _conversation(raw, tokenizer, form, turns)

    told = RowConversation(*rendered(raw.messages, raw.tools, tokenizer, render, weights=raw.weights))
    turns = {told.origin(turn.message): turn.reached for turn in told.conversation.turns}
    wordy = [i for i in turns if i is not None and str(messages[i].get("content") or "").strip()]
    if mask_prompt and wordy and not any(turns.values()):
        raise FormatError(
            f"{raw.where}: the chat template leaves out what the assistant says (message {wordy[0] + 1}).",
            "'data check' without --mask-prompt shows what it makes of the row; another base, or --chat-template FILE.",
        )
    return told


def has_words(message: Mapping[str, Any]) -> bool:
    """Whether a message says anything, in words or thoughts; calls are none."""
    return any(isinstance(value, str) and value.strip() for key, value in message.items() if key not in NOT_SAID)


def _require_template(raw: RawRow, tokenizer: Any) -> None:
    if not has_template(tokenizer):
        raise FormatError(
            f"{raw.where}: a chat row, but the tokenizer has no chat template.",
            "use an instruction-tuned base model, or text or prompt-completion rows.",
        )


def _plain_conversation(raw: RawRow, tokenizer: Any) -> tuple[Fitted, Tokens]:
    """A conversation as the template takes it, and its tokens."""
    _require_template(raw, tokenizer)

    def render(form: Fitted) -> Tokens:
        with refusing(raw.where):
            tokens = tokenizer.apply_chat_template(
                form.messages, tools=form.tools, return_dict=False, **raw.template_arguments
            )
        end = next_begins(form.messages, tokenizer)
        return [*tokens, *(end.ids if end else ())]

    return rendered(raw.messages, raw.tools, tokenizer, render, weights=raw.weights)


def _may_be_left_out(message: Mapping[str, Any]) -> bool:
    if message["role"] != "assistant":
        return False
    return "</" in (message.get("content") or "") or any(map(message.get, message.keys() - {"role", "content"}))


def _with_end(tokens: Tokens, tokenizer: Any) -> Tokens:
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _once(tokens: Tokens, tokenizer: Any) -> Tokens:
    """A text's tokens; a BOS that stands in the text beside the tokenizer's own comes once."""
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


def _text(raw: RawRow, tokenizer: Any, mask_prompt: bool) -> Tokens:
    if mask_prompt:
        raise FormatError(
            f"{raw.where}: a text row has no prompt to mask.",
            "use prompt-completion or chat rows, or train without --mask-prompt.",
        )
    return _with_end(_once(list(tokenizer.encode(raw.text)), tokenizer), tokenizer)


def _plain_completion(raw: RawRow, tokenizer: Any) -> tuple[Tokens, np.ndarray]:
    """Without a chat template a prompt and its completion are simply joined."""
    prompt = _once(prompt_tokens(raw.prompt, tokenizer), tokenizer)
    answer = list(tokenizer.encode(raw.completion, add_special_tokens=False))
    tokens = _with_end(prompt + answer, tokenizer)
    return tokens, np.arange(len(tokens)) >= len(prompt)


def messages_of(raw: RawRow) -> list[dict[str, Any]]:
    """The conversation of a chat or prompt-completion row."""
    return raw.messages
