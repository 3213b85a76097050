"""A conversation in tokens, with those marked that the model writes: the loss mask, by construction.

The template is rendered once as the tokenizer does it and once traced (`templates.tracing`), which must give the same
text; `data.turns` finds the turns in it, and the tokenizer's offsets bring characters to tokens. A tokenizer whose
conversations are written by other code than a jinja template has its turns found by rendering changed conversations
(`data.rerendering`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from mlx_adapters.templates.traced import Leaf, leaves
from mlx_adapters.templates.tracing import NOT_SAID, Rendering, Run, wrapped

Messages = Sequence[Mapping[str, Any]]
_BLANK = re.compile(r"\s*")
CALLING = {"role": "assistant", "content": WORD, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7", "tool_call_id": CALL["id"], "name": "look"}
CALL_TEXTS = ("name", "arguments")  # of a tool call; its id and type say nothing
LONGEST_PIECE = 16  # tokens that may share one character, where a tokenizer has no offsets


@dataclass(frozen=True)
class Conversation:
    """A conversation as the model sees it.

    `tokens`: (n,) int64. `trained`: (n,) bool, True where the model writes the token, in the turns that were asked
    for. `turns` tells each of them. `messages` and `tools` are as the template took them. `written` is the traced
    rendering, None where there is no jinja template.
    """

    messages: Messages = field(repr=False)
    tokens: np.ndarray
    trained: np.ndarray
    turns: tuple[Said, ...]
    encoded: Encoded = field(repr=False)
    written: Written | None = field(repr=False)
    tools: Sequence[Any] | None = field(default=None, repr=False)


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
    return Conversation(messages, np.array(encoded.ids, np.int64), trained, tuple(marked), encoded, traced, tools)


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


@lru_cache(maxsize=8)
def special_words(tokenizer: Any) -> re.Pattern[str]:
    """What the tokenizer reads as one of its special tokens wherever it stands: the end of a turn, of a text."""
    own = getattr(tokenizer, "_tokenizer", tokenizer)
    words = {token.content for token in own.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(words))) or "(?!)")


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


def left_out(told: Conversation, messages: Iterable[int] | None = None) -> Iterator[tuple[int, str, str]]:
    """The texts that the chat template does not write, of all messages or of these (numbers from 0): the message, its
    field, and the characters."""
    numbers = range(len(told.messages)) if messages is None else messages
    doubtful = {number for number in numbers if not _whole(told, number)}
    for number, turn in enumerate(wrapped(told.messages) if doubtful else ()):
        for leaf in leaves([turn]) if number in doubtful else ():
            if _is_said(leaf):
                yield from ((number, str(leaf.path[0]), text) for text in _missing(told, leaf))


def _whole(told: Conversation, number: int) -> bool:
    """Whether all of a message is surely there: it says nothing but its content, and as many characters are its own."""
    message = told.messages[number]
    content = message.get("content")
    if told.written is None or not isinstance(content, str) or message.keys() - NOT_SAID != {"content"}:
        return False
    runs = told.written.own(number)
    return all(run.offset is not None for run in runs) and _length(runs) >= len(content.strip())


def _length(runs: Iterable[Run]) -> int:
    """How many characters of a message they hold, each counted once."""
    here = total = 0
    for start, stop in sorted((run.offset or 0, (run.offset or 0) + run.stop - run.start) for run in runs):
        total += max(0, stop - max(here, start))
        here = max(here, stop)
    return total


def tools_left_out(told: Conversation) -> list[str]:
    """The names of the conversation's tools, if neither the template nor a message tells the model of any."""
    functions = [tool.get("function", tool) for tool in told.tools or [] if isinstance(tool, Mapping)]
    names = [str(function["name"]) for function in functions if isinstance(function, Mapping) and "name" in function]
    if not names or told.written is None:
        return [] if any(name in told.encoded.text for name in names) else names
    texts = [str(message.get("content")) for message in told.messages if message["role"] != "assistant"]
    texts.append(_template_text(told.written.rendering))
    return [] if any(name in text for name in names for text in texts) else names


def _is_said(leaf: Leaf) -> bool:
    field, *rest = leaf.path
    if field == "tool_calls":
        return any(part in CALL_TEXTS for part in rest)
    return field not in NOT_SAID and field != "tool_call_id" and rest[-1:] != ["type"]


def _missing(told: Conversation, leaf: Leaf) -> Iterator[str]:
    """The parts of a text that are not among the row's characters, and that the template did not write anew (it may
    take <think> apart and put it back)."""
    written = told.written
    if written is None:
        if leaf.text.strip() and leaf.text.strip() not in told.encoded.text:
            yield leaf.text.strip()
        return
    of_message = [run for run in written.rendering.runs if run.leaf.message == leaf.message]
    runs = [run for run in of_message if run.leaf.text == leaf.text]
    region = written.regions.get(leaf.message, (0, len(written.rendering.text) if of_message else 0))
    if _is_later_call(told.messages[leaf.message], leaf, written.rendering.text[slice(*region)]):
        yield leaf.text
    if any(run.offset is None for run in runs):
        return
    covered = sorted(((run.offset or 0), (run.offset or 0) + run.stop - run.start) for run in runs)
    gaps, here = [], 0
    for start, stop in (*covered, (len(leaf.text), len(leaf.text))):
        gaps.append(leaf.text[here:start].strip())
        here = max(here, stop)
    if any(gaps):
        anew = _template_text(written.rendering, *region)
        # What was made of several texts (arguments as JSON) is told to come from the first of them.
        made = [written.rendering.text[run.start : run.stop] for run in of_message if run.offset is None]
        yield from (gap for gap in gaps if gap and gap not in anew and not _stands_in(gap, made))


def _is_later_call(message: Mapping[str, Any], leaf: Leaf, text: str) -> bool:
    """Whether it is the name of a call that a message's text does not hold as often as calls up to this one do."""
    if leaf.path[0] != "tool_calls" or leaf.path[2:] != ("function", "name"):
        return False
    names = [call["function"]["name"] for call in message["tool_calls"][: int(leaf.path[1]) + 1]]
    return 1 < names.count(leaf.text) > text.count(leaf.text) > 0


def _stands_in(text: str, made: Iterable[str]) -> bool:
    forms = {text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))}
    return any(form in one for form in forms for one in made)


def _template_text(rendering: Rendering, start: int = 0, stop: int | None = None) -> str:
    """What the template itself wrote there; \\0 for the characters of messages."""
    characters = list(rendering.text)
    for run in rendering.runs:
        characters[run.start : run.stop] = "\0" * (run.stop - run.start)
    return "".join(characters[start:stop])
