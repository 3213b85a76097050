"""Preferences, in TRL's forms: two answers to one prompt, or one answer that is good or bad.

- a prompt, `chosen` and `rejected`, each a text or a list of messages; a list may repeat the prompt;
- without a prompt: lists of messages, whose common beginning is the prompt; or texts, taken as they are;
- a prompt and its answer, as for plain fine-tuning, and `label`, true or false.

OpenAI's own form, a request with two lists of what is answered, is brought into TRL's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_adapters.errors import FormatError
from mlx_adapters.rows.messages import Message, conversation, spelled, turn
from mlx_adapters.rows.values import is_missing, kind, parsed, plain

SIDES = ("chosen", "rejected")
OPENAI = ("input", "preferred_output", "non_preferred_output")
LABELS = {"true": True, "false": False}  # as tables of text write them
Turns = list[Message]


def from_openai(values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A row of OpenAI's preference tuning with TRL's columns, None for any other. Raises FormatError, naming the place,
    for a request without messages."""
    if not set(OPENAI) <= values.keys():
        return None
    request, *sides = (parsed(values[name]) for name in OPENAI)
    if not isinstance(request, Mapping) or is_missing(request.get("messages")):
        raise FormatError(f"{where}: 'input' must be an object with 'messages', not {kind(request)}.")
    rest = {name: value for name, value in request.items() if name != "messages" and not is_missing(value)}
    return {**rest, "prompt": request["messages"], **dict(zip(SIDES, sides, strict=True))}


def two_answers(prompt: Any, chosen: Any, rejected: Any, where: str) -> tuple[Any, tuple[Any, Any]]:
    """(the prompt, (chosen answer, rejected answer)), each a text or a list of messages; no prompt for whole texts.

    Raises FormatError, naming the place.
    """
    sides = [_answer(value, name, where) for name, value in zip(SIDES, (chosen, rejected), strict=True)]
    prompt = spelled(prompt, "prompt", where)
    if all(isinstance(side, str) for side in sides):
        return prompt, (sides[0], sides[1])
    first, second = ([turn("assistant", side)] if isinstance(side, str) else side for side in sides)
    if prompt is None:
        return _split(first, second, where)
    asked = [turn("user", prompt)] if isinstance(prompt, str) else conversation(prompt, where, "prompt")[0]
    return asked, (_without(asked, first, where), _without(asked, second, where))


def label_of(values: Mapping[str, Any], where: str) -> bool:
    """The label of an answer. Raises FormatError, naming the place, for anything but true and false."""
    label = values.get("label")
    label_read = LABELS.get(label.strip().lower()) if isinstance(label, str) else plain(label)
    if isinstance(label_read, bool):
        return label_read
    wrong = "the row has no 'label'" if is_missing(label) else f"'label' must be true or false, not {repr(label)[:40]}"
    raise FormatError(f"{where}: {wrong}.", 'an answer is marked with "label": true or false.')


def says_nothing(last_turns: Sequence[Message]) -> str | None:
    """Why nothing can be learned from answers that end so, or None."""
    for name, message in zip(SIDES, last_turns, strict=False):
        said = (value for key, value in message.items() if key != "role")
        if not any(value.strip() if isinstance(value, str) else value for value in said):
            return f"the {name} answer is empty" if len(last_turns) > 1 else "the answer is empty"
    return None


def _answer(value: Any, name: str, where: str) -> str | Turns:
    value = spelled(value, name, where)
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple | Mapping):
        raise FormatError(f"{where}: '{name}' must be text or a list of messages, not {kind(value)}.")
    return conversation([value] if isinstance(value, Mapping) else value, where, name)[0]


def _split(chosen: Turns, rejected: Turns, where: str) -> tuple[Turns, tuple[Turns, Turns]]:
    """The common beginning, and what is left of both: at least the last turn of each."""
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if same == 0:
        raise FormatError(
            f"{where}: 'chosen' and 'rejected' do not begin with the same turn.",
            "give the question as 'prompt', or begin both with it.",
        )
    return chosen[:same], (chosen[same:], rejected[same:])


def _without(asked: Turns, turns: Turns, where: str) -> Turns:
    """The turns after a prompt that they repeat, perhaps after a system prompt, perhaps with other blanks around it.

    Raises FormatError, naming the place, for a conversation that begins with another question than the prompt.
    """
    for start in range(len(turns) - len(asked)):
        stop = start + len(asked)
        same = all(_stripped(one) == _stripped(other) for one, other in zip(turns[start:stop], asked, strict=True))
        if same and all(message["role"] == "system" for message in turns[:start]):
            return turns[stop:]
    if turns[0]["role"] in ("system", "user") and asked[-1]["role"] == "user":
        raise FormatError(
            f"{where}: the answers are whole conversations that do not begin with 'prompt'.",
            "leave out 'prompt', or give the turns after it as 'chosen' and 'rejected'.",
        )
    return turns


def _stripped(message: Message) -> Message:
    return {key: value.strip() if isinstance(value, str) else value for key, value in message.items()}
