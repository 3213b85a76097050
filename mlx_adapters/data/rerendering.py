"""Where turns lie in a conversation whose template cannot be looked into, found by rendering changed conversations.

mlx-lm writes the conversations of some models by code of its own. A turn begins where the conversation before it,
rendered with the generation prompt, ends in the whole; if the whole begins otherwise, where the first character
changes when another text is put in the turn's place. It ends with the first token that stops a generation after the
last character that changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_adapters.data.turns import Encoded, Ends, Said, agreement
from mlx_adapters.errors import FormatError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]
TEXTS = ("0", "zebra.")  # two, in case one begins or ends as the turn does


def rerendered(
    render: Render, messages: Messages, text: str, encoded: Encoded, turns: Sequence[int], ends: Ends, where: str
) -> list[Said]:
    """What the model writes of these messages, in tokens. `text` is what they were rendered to; `encoded` may go on.

    Raises FormatError if a turn is not found.
    """
    return [_turn(render, messages, text, encoded, turn, ends, where) for turn in turns]


def _turn(render: Render, messages: Messages, text: str, encoded: Encoded, turn: int, ends: Ends, where: str) -> Said:
    changed = _changed(render, messages, text, turn)
    prompt = _attempt(render, messages[:turn], True)
    if prompt is not None and text.startswith(prompt):
        start, stop = len(prompt), changed[1] if changed else len(prompt)
    elif changed:
        start, stop = changed
    else:
        later = any(message["role"] == "assistant" for message in messages[turn + 1 :])
        raise FormatError(
            f"{where}: the chat template does not show where message {turn + 1} lies.",
            f"train without --mask-prompt{', or with --last-turn-only' if later else ''}.",
        )
    first, last = encoded.from_char(start), encoded.to_char(stop)
    end = next((i + 1 for i in range(last, len(encoded.ids)) if encoded.ids[i] in ends.stop | ends.special), last)
    return Said(turn, ((first, end),) if first < end else (), True, end > 0 and encoded.ids[end - 1] in ends.stop)


def _changed(render: Render, messages: Messages, text: str, turn: int) -> tuple[int, int] | None:
    """[start, stop) of the characters that change when the turn's words do."""
    starts, stops = [], []
    for words in TEXTS:
        other = _attempt(
            render, [*messages[:turn], {"role": "assistant", "content": words}, *messages[turn + 1 :]], False
        )
        if other is None:
            return None
        if other != text:
            starts.append(agreement(text, other))
            room = min(len(text), len(other)) - starts[-1]
            stops.append(len(text) - min(agreement(text[::-1], other[::-1]), room))
    return (min(starts), max(stops)) if starts else None


def _attempt(render: Render, messages: Messages, generation_prompt: bool) -> str | None:
    try:
        return render(messages, generation_prompt)
    except Exception:  # a template may refuse a conversation that stops here
        return None
