"""From rows to tokens, with the tokens marked that the loss counts.

Without `mask_prompt` every token but the first is trained. With it only what the model writes: all turns of the
assistant, or the last one (`last_turn_only`), from the end of the generation prompt to the token that ends the turn.
`data.conversation` finds them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_adapters.data.conversation import Conversation, conversation, refusing
from mlx_adapters.errors import FormatError
from mlx_adapters.rows.row import RawRow
from mlx_adapters.system.tracing import NOT_SAID

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
    tokens: Sequence[int] | np.ndarray
    trained: np.ndarray | None
    if raw.format == "text":
        tokens, trained = _text(raw, tokenizer, mask_prompt)
    elif raw.format == "completion" and not has_template(tokenizer):
        tokens, trained = _plain_completion(raw, tokenizer)
    elif mask_prompt:
        found = row_conversation(raw, tokenizer, last_turn_only)
        tokens, trained = found.tokens, found.trained
    else:
        tokens, trained = _whole_conversation(raw, tokenizer), None
    marks = np.ones(len(tokens), bool) if trained is None or not mask_prompt else trained
    marks[:1] = False
    cut = slice(max_seq_length)
    return Row(np.array(tokens[cut], np.int32), marks[cut], raw.where, len(tokens))


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template."""
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))


def row_conversation(raw: RawRow, tokenizer: Any, last_turn_only: bool = False) -> Conversation:
    """A chat or completion row, with the turns marked that are trained (see `conversation`).

    Turns of weight 0 are not. Raises FormatError for a row that has no turn to train, or none whose text the template
    writes.
    """
    _require_template(raw, tokenizer)
    messages = raw.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise FormatError(f"{raw.where}: no assistant turn to train on.", "add one, or drop --mask-prompt.")
    turns = [i for i in (turns[-1:] if last_turn_only else turns) if raw.weights[i]]
    found = conversation(
        messages,
        tokenizer,
        raw.where,
        tools=raw.tools,
        template_arguments=raw.template_arguments,
        turns=turns,
    )
    if turns and not any(turn.reached for turn in found.turns) and any(_has_words(messages[i]) for i in turns):
        which = ", ".join(str(i + 1) for i in turns)
        raise FormatError(
            f"{raw.where}: the chat template writes nothing of what the assistant says (message {which}).",
            "see what it makes of the row: data check --row, or train without --mask-prompt.",
        )
    return found


def _has_words(message: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) and value.strip() for key, value in message.items() if key not in NOT_SAID)


def _require_template(raw: RawRow, tokenizer: Any) -> None:
    if not has_template(tokenizer):
        raise FormatError(
            f"{raw.where}: a chat row, but the tokenizer has no chat template.",
            "use an instruction-tuned base model, or text or prompt-completion rows.",
        )


def _whole_conversation(raw: RawRow, tokenizer: Any) -> Tokens:
    _require_template(raw, tokenizer)
    with refusing(raw.where):
        return list(
            tokenizer.apply_chat_template(raw.messages, tools=raw.tools, return_dict=False, **raw.template_arguments)
        )


def _with_end(tokens: Tokens, tokenizer: Any) -> Tokens:
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _encoded(text: str, tokenizer: Any) -> Tokens:
    """A text with the tokens that the tokenizer puts around it; a BOS that stands in the text already comes once."""
    tokens, bos = list(tokenizer.encode(text)), tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


def _text(raw: RawRow, tokenizer: Any, mask_prompt: bool) -> tuple[Tokens, None]:
    if mask_prompt:
        raise FormatError(
            f"{raw.where}: a text row has no prompt to mask.",
            "use prompt-completion or chat rows, or train without --mask-prompt.",
        )
    return _with_end(_encoded(raw.text, tokenizer), tokenizer), None


def _plain_completion(raw: RawRow, tokenizer: Any) -> tuple[Tokens, np.ndarray]:
    """Without a chat template a prompt and its completion are simply joined."""
    prompt = _encoded(raw.prompt, tokenizer)
    answer = list(tokenizer.encode(raw.completion, add_special_tokens=False))
    tokens = _with_end(prompt + answer, tokenizer)
    return tokens, np.arange(len(tokens)) >= len(prompt)


def messages_of(raw: RawRow) -> list[dict[str, Any]]:
    """The conversation of a chat or prompt-completion row."""
    return raw.messages
