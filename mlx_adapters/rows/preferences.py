"""Preferences, in TRL's forms: two answers to one prompt, or one answer that is good or bad.

- a prompt, `chosen` and `rejected`, each a text or a list of messages; a list may repeat the prompt;
- without a prompt: lists of messages, whose common beginning is the prompt; or texts, taken as they are;
- a prompt and its answer, as for plain fine-tuning, and `label`, true or false.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_adapters.errors import FormatError
from mlx_adapters.rows.messages import Message, conversation, turn
from mlx_adapters.rows.values import is_missing, kind, parsed, plain

SIDES = ("chosen", "rejected")
LABELS = {"true": True, "false": False}  # as tables of text write them
Turns = list[Message]


def two_answers(prompt: Any, chosen: Any, rejected: Any, where: str) -> tuple[Any, tuple[Any, Any]]:
    """(the prompt, (chosen answer, rejected answer)), each a text or a list of messages; no prompt for whole texts.

    Raises FormatError, naming the place.
    """
    sides = [_answer(value, name, where) for name, value in zip(SIDES, (chosen, rejected), strict=True)]
    if all(isinstance(side, str) for side in sides):
        return prompt, (sides[0], sides[1])
    first, second = ([turn("assistant", side)] if isinstance(side, str) else side for side in sides)
    if prompt is None:
        return _split(first, second, where)
    asked = [turn("user", prompt)] if _is_text(prompt) else conversation(prompt, where, "prompt")[0]
    return asked, (_without(asked, first), _without(asked, second))


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


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(parsed(value), list)


def _answer(value: Any, name: str, where: str) -> str | Turns:
    if _is_text(value):
        return value
    if not isinstance(value, str | list | tuple | Mapping):
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


def _without(asked: Turns, turns: Turns) -> Turns:
    """The turns after a prompt that they repeat, perhaps after a system prompt."""
    for start in range(len(turns) - len(asked)):
        stop = start + len(asked)
        if turns[start:stop] == asked and all(message["role"] == "system" for message in turns[:start]):
            return turns[stop:]
    return turns
