"""Conversations that a base's chat template refuses, put otherwise until it takes them.

What a template renders stays as it is. Of what it refuses, by raising, this is tried, the least change first:

- neighboring turns of one speaker become one, parted by an empty line; an empty question goes before a first answer;
- several calls in a turn become turns of one call, each followed by its result;
- tools, calls and results become text, in the form in which a server of this package tells of them
  (`templates.tool_calls`).

Each is what the conversation says, in the words that the template has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_adapters.errors import AdapterError
from mlx_adapters.system.door import TokenizerWrapper
from mlx_adapters.system.templates import LimitError
from mlx_adapters.templates.habits import fitted
from mlx_adapters.templates.tool_calls import tool_format, with_tools

Message = Mapping[str, Any]
Part = tuple[dict[str, Any], tuple[int, ...]]  # a message, and the numbers of those that it was made of
Result = TypeVar("Result")
JOINED, ASKED = "neighboring turns of one speaker as one", "an empty question before a first answer"
SINGLE, TOLD = "one call in a turn", "tools, calls and results as text"
APART = "\n\n"


@dataclass(frozen=True)
class Fitted:
    """A conversation as a template takes it.

    `messages` and `tools` are what it is given. `origins`: of each message the numbers from 0 of those that it was made
    of. `changes`: what was put otherwise since the template refused it.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    origins: tuple[tuple[int, ...], ...]
    changes: tuple[str, ...] = ()


def rendered(
    messages: Sequence[Message],
    tools: list[Any] | None,
    tokenizer: TokenizerWrapper,
    render: Callable[[Fitted], Result],
    *,
    template: str | None = None,
    weights: Sequence[int] = (),
) -> tuple[Fitted, Result]:
    """The conversation in the first form that the template takes, and what `render` makes of it.

    Args:
        messages: in the one form of `rows.messages`.
        tools: that it may use.
        tokenizer: whose template it is.
        render: raises what the template raises.
        template: another one's text.
        weights: of each message; turns of two weights are not joined.

    Raises what the template raises of the conversation as it is, if it takes none.
    """
    refusal: Exception | None = None
    for form in _forms(messages, tools, tokenizer, template, weights):
        try:
            return form, render(form)
        except Exception as error:  # a template may raise what it likes
            ours = isinstance(error, AdapterError) and error.__cause__ is None  # not what the template says
            if ours or isinstance(error, LimitError) or isinstance(error.__cause__, LimitError):
                raise
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _forms(
    messages: Sequence[Message],
    tools: list[Any] | None,
    tokenizer: TokenizerWrapper,
    template: str | None,
    weights: Sequence[int],
) -> Iterator[Fitted]:
    def form(parts: list[Part], tools: list[Any] | None, changes: tuple[str, ...]) -> Fitted:
        return Fitted([message for message, _ in parts], tools, tuple(origin for _, origin in parts), changes)

    usual = _usual([(dict(message), (i,)) for i, message in enumerate(messages)], tokenizer, template)
    yield form(usual, tools, ())
    for parts, changes in ((usual, ()), (_single(usual), (SINGLE,))):
        if changes and len(parts) == len(usual):
            continue
        if changes:
            yield form(parts, tools, changes)
        spoken, how = _in_turn(parts, weights)
        if how:
            yield form(_usual(spoken, tokenizer, template), tools, (*changes, *how))
    if not tools and not any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
        return
    try:
        given, told = with_tools(messages, tools or [], tool_format(tokenizer, template))
    except (KeyError, TypeError):  # a call in a form of its own
        return
    if given != [dict(message) for message in messages]:
        added = len(given) - len(messages)  # a system turn that tells of the tools
        texts: list[Part] = [(message, (i - added,) if i >= added else ()) for i, message in enumerate(given)]
        spoken, how = _in_turn(_usual(texts, tokenizer, template), weights)
        yield form(_usual(spoken, tokenizer, template), told, (TOLD, *how))


def _usual(parts: list[Part], tokenizer: TokenizerWrapper, template: str | None) -> list[Part]:
    """As the template's habits are; system turns that it refuses have gone into the first question."""
    messages = fitted([message for message, _ in parts], tokenizer, template)
    gone = len(parts) - len(messages)
    origins = [origin for _, origin in parts]
    first = tuple(number for origin in origins[: gone + 1] for number in origin)
    return list(zip(messages, [first, *origins[gone + 1 :]], strict=True))


def _single(parts: list[Part]) -> list[Part]:
    """Turns of several calls as turns of one, each followed by its result, if they are as many or there are none."""
    fitted: list[Part] = []
    rest = list(parts)
    while rest:
        (message, origin), rest = rest[0], rest[1:]
        calls = message.get("tool_calls") or []
        until = next((i for i, (after, _) in enumerate(rest) if after.get("role") != "tool"), len(rest))
        results = _by_call(calls, rest[:until])
        if len(calls) < 2 or results is None:
            fitted.append((message, origin))
            continue
        silent = {"role": message["role"], "content": None if message.get("content") is None else ""}
        for number, call in enumerate(calls):
            fitted.append(((silent if number else message) | {"tool_calls": [call]}, origin))
            fitted.extend(results[number : number + 1])
        rest = rest[until:]
    return fitted


def _by_call(calls: Sequence[Any], results: list[Part]) -> list[Part] | None:
    """The results in the order of the calls; None if they are not one for each."""
    if len(results) not in (0, len(calls)):
        return None
    ids = [call.get("id") for call in calls if isinstance(call, Mapping)]
    of = {message.get("tool_call_id"): (message, origin) for message, origin in results}
    return [of[id] for id in ids] if set(ids) == set(of) and len(of) == len(results) and None not in of else results


def _in_turn(parts: list[Part], weights: Sequence[int]) -> tuple[list[Part], tuple[str, ...]]:
    """Every speaker after the other, the user first; and what was changed for it."""
    fitted: list[Part] = []
    for message, origin in parts:
        if fitted and _go_together(fitted[-1], (message, origin), weights):
            before, numbers = fitted[-1]
            fitted[-1] = (_one(before, message), (*numbers, *origin))
        else:
            fitted.append((message, origin))
    changes: tuple[str, ...] = (JOINED,) if len(fitted) < len(parts) else ()
    first = next((i for i, (message, _) in enumerate(fitted) if message.get("role") not in ("system", "developer")), 0)
    if fitted and fitted[first][0].get("role") == "assistant":
        fitted.insert(first, ({"role": "user", "content": ""}, ()))
        changes += (ASKED,)
    return fitted, changes


def _go_together(one: Part, other: Part, weights: Sequence[int]) -> bool:
    roles = {message.get("role") for message, _ in (one, other)}
    plain = all(
        not message.get("tool_calls") and isinstance(message.get("content"), str) for message, _ in (one, other)
    )
    weighed = {weights[number] for _, origin in (one, other) for number in origin if number < len(weights)}
    return plain and (roles == {"user"} or (roles == {"assistant"} and len(weighed) < 2))


def _one(one: Message, other: Message) -> dict[str, Any]:
    """Two messages of one speaker as one."""
    texts = {
        name: APART.join(text for text in (one[name], other[name]) if text)
        for name in one.keys() & other.keys()
        if name != "role" and isinstance(one[name], str) and isinstance(other[name], str)
    }
    return {**other, **one, **texts}
