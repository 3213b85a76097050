"""A conversation in tokens, with those marked that the model writes: the loss mask, by construction.

The template is rendered once as the tokenizer does it and once traced (`templates.tracing`), which must give the same
text; `data.turns` finds the turns in it, and the tokenizer's offsets bring characters to tokens. A tokenizer whose
conversations are written by other code than a jinja template has its turns found by rendering changed conversations
(`data.rerendering`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from mlx_adapters.data.rerendering import rerendered
from mlx_adapters.data.turns import Encoded, Ends, Said, Written, said, written
from mlx_adapters.errors import FormatError
from mlx_adapters.system.door import TokenizerWrapper
from mlx_adapters.system.templates import seen_renderings
from mlx_adapters.templates.habits import ASK, CALL, WORD, fitted

Messages = Sequence[Mapping[str, Any]]
_BLANK = re.compile(r"\s*")
CALLING = {"role": "assistant", "content": WORD, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7", "tool_call_id": CALL["id"], "name": "look"}
LONGEST_PIECE = 16  # tokens that may share one character, where a tokenizer has no offsets


@dataclass(frozen=True)
class Conversation:
    """A conversation as the model sees it.

    `tokens`: (n,) int32. `trained`: (n,) bool, True where the model writes the token, in the turns that were asked
    for. `turns` tells each of them. `messages` are as the template took them. `written` is the traced rendering, None
    where there is no jinja template.
    """

    messages: Messages = field(repr=False)
    tokens: np.ndarray
    trained: np.ndarray
    turns: tuple[Said, ...]
    encoded: Encoded = field(repr=False)
    written: Written | None = field(repr=False)


def conversation(
    messages: Messages,
    tokenizer: TokenizerWrapper,
    where: str,
    *,
    tools: Sequence[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    turns: Sequence[int] | None = None,
) -> Conversation:
    """The tokens of a conversation, and which of them the model writes.

    Args:
        messages: as the chat template expects them (`rows.messages`).
        tokenizer: the base's.
        where: the place of the row, for errors.
        tools: that the conversation may use.
        template_arguments: what the template is given beside, such as {"enable_thinking": False}.
        turns: the numbers from 0 of the assistant's messages to mark; all by default.

    Raises FormatError, naming the place, if the template refuses the row or the turns cannot be found.

    Example:
        >>> found = conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], tok, "")
        >>> tok.decode(found.tokens[found.trained])
        'Yes?<|im_end|>'
    """
    given = {"tools": tools or None, **(template_arguments or {})}

    def render(changed: Messages, generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            list(changed), add_generation_prompt=generation_prompt, tokenize=False, **given
        )

    if turns is None:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    with refusing(where), seen_renderings() as calls:
        text = render(messages, False)
    ends = ends_of(tokenizer)
    encoded = encode(text, tokenizer, where)
    if end := next_begins(messages, tokenizer):
        encoded = encoded.followed_by(end)
    traced = written(calls[-1]) if calls and calls[-1].text == text else None
    if traced is not None:
        marked = said(traced, encoded, turns, ends)
    else:
        marked = rerendered(render, messages, text, encoded, turns, ends, where)
    trained = np.zeros(len(encoded.ids), bool)
    for start, stop in (span for turn in marked for span in turn.spans):
        trained[start:stop] = True
    return Conversation(messages, np.array(encoded.ids, np.int32), trained, tuple(marked), encoded, traced)


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Within the block whatever the template raises becomes a FormatError that names the row."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
        raise FormatError(
            f"{where}: the chat template refuses the row: {why}.",
            "change the row, or give another template: --chat-template FILE.",
        ) from error


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of the tokens that stop a generation: EOS and what the model's configs name."""
    return frozenset(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id})


def ends_of(tokenizer: Any) -> Ends:
    """The tokens that may end a turn."""
    stop = stop_ids(tokenizer)
    added, special = _added(getattr(tokenizer, "_tokenizer", tokenizer))
    return Ends(stop, special | stop, added | stop)


def next_begins(messages: Messages, tokenizer: Any) -> Encoded | None:
    """The token that ends a last turn of the assistant's where the template writes it as the beginning of the next
    message alone, as GLM's writes `<|user|>`: the model has to write it. None for other templates and turns."""
    if messages[-1]["role"] != "assistant":
        return None
    return _next_begins(tokenizer, bool(messages[-1].get("tool_calls")))


@lru_cache(maxsize=16)
def _next_begins(tokenizer: Any, calls: bool) -> Encoded | None:
    """As for any last turn, with calls or without: one is rendered as the last, and followed by a message."""
    last, following = (CALLING, RESULT) if calls else ({"role": "assistant", "content": WORD}, ASK)
    try:
        some, more = (
            str(tokenizer.apply_chat_template(fitted([ASK, last, *rest], tokenizer), tokenize=False))
            for rest in ([], [following])
        )
        whole = encode(more, tokenizer, "")
    except Exception:  # a template may raise what it likes
        return None
    if not more.startswith(some) or len(some) == len(more):
        return None
    stop, end = stop_ids(tokenizer), whole.from_char(len(some))
    if whole.ids[end] not in stop or not stop.isdisjoint(whole.ids[whole.from_char(some.rfind(WORD)) : end]):
        return None
    text = more[whole.starts[end] : whole.ends[end]]
    return Encoded(text, [whole.ids[end]], np.array([0]), np.array([len(text)]))


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> tuple[frozenset[int], frozenset[int]]:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    return frozenset(added), frozenset(special | set(tokenizer.all_special_ids))


def encode(text: str, tokenizer: Any, where: str) -> Encoded:
    """A rendered conversation in tokens, and the characters that each stands for.

    Raises FormatError for a tokenizer that does not tell them and whose tokens cannot be found in the text.
    """
    own = getattr(tokenizer, "_tokenizer", tokenizer)
    if getattr(own, "is_fast", False):
        encoding = own(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        if len(offsets) == 0 or (np.diff(offsets, axis=0) >= 0).all():
            return Encoded(text, ids, offsets[:, 0], offsets[:, 1])
    ids = list(own.encode(text, add_special_tokens=False))
    borders = _aligned(text, ids, lambda some: own.decode(some, clean_up_tokenization_spaces=False))
    if borders is None:
        raise FormatError(
            f"{where}: the tokenizer does not tell which characters its tokens stand for.",
            "train without --mask-prompt, or use a base with a fast tokenizer (tokenizer.json).",
        )
    return Encoded(text, ids, borders[:, 0], borders[:, 1])


def _aligned(text: str, ids: list[int], decode: Callable[[list[int]], str]) -> np.ndarray | None:
    """[start, stop) of each token, (n, 2), by what it decodes to; tokens that share a character all stand for it. None
    if what some tokens say is not found."""
    borders, here, first = [], 0, 0
    for token in range(len(ids)):
        stop = _reaches(text, here, decode(ids[first : token + 1]))
        if stop is not None:
            borders += [(here, stop)] * (token + 1 - first)
            here, first = stop, token + 1
        elif token - first >= LONGEST_PIECE:
            return None
    return np.array(borders, np.int64).reshape(-1, 2) if first == len(ids) else None


def _reaches(text: str, here: int, piece: str) -> int | None:
    """Where a piece that begins `here` in the text ends. Tokenizers add a blank or leave blanks out before it."""
    if piece and text.startswith(piece, here):
        return here + len(piece)
    if piece.startswith(" ") and text.startswith(piece[1:], here):
        return here + len(piece) - 1
    blank = _BLANK.match(text, here)
    starts = range(here + 1, blank.end() + 1) if piece and blank else ()
    return next((start + len(piece) for start in starts if text.startswith(piece, start)), None)
