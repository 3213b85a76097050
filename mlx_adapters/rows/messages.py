"""Conversations in the one form that chat templates expect, whatever form they came in.

A message is {"role", "content", ...}: content is text, or None beside tool calls as OpenAI writes it; `tool_calls` is
a list of {"type": "function", "function": {"name", "arguments"}} with the arguments as an object. Accepted are also:
ShareGPT's `from` and `value`, other names of the speakers, lists of content parts, arguments and calls as JSON text,
OpenAI's older `function_call`, its `refusal` in place of an answer, and a whole conversation as JSON text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from mlx_adapters.errors import FormatError
from mlx_adapters.rows.values import is_missing, kind, parsed, plain
from mlx_adapters.templates.habits import thoughts

Message = dict[str, Any]
# Names of the speakers in ShareGPT's rows and others', in small letters.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
OWN_ROLES = ("observation",)  # that templates write by their names, as GLM-4's does
CALLING = ("function_call", "tool_call")  # speakers whose words are a call
ARGUMENTS = ("arguments", "parameters", "args", "input")  # what a call gives its function
CONTENTS = ("content", "value", "text")  # what holds a speaker's words
WEIGHTS = ("weight", "train", "training", "loss")  # OpenAI's, what axolotl's rows have, and ms-swift's
PARTLY = ("train_detail", "training_detail")  # axolotl's: which characters of a turn count
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
THOUGHT_PARTS = ("thinking", "reasoning")
_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


def conversation(value: Any, where: str, name: str = "messages") -> tuple[list[Message], tuple[int, ...]]:
    """The messages of a column, and of each its weight: 1, or 0 for a turn that is context alone.

    Args:
        value: a list of messages, or JSON text of one.
        where: the place of the row, for errors.
        name: the column's.

    Raises FormatError, naming the place and the message.
    """
    value = in_rows(spelled(value, name, where))
    if not isinstance(value, list | tuple) or not value:
        raise FormatError(f"{where}: '{name}' must be a list with at least one message.")
    of = "" if name == "messages" else f" of '{name}'"
    weighted = [_message(message, f"message {i}{of}", where) for i, message in enumerate(value, 1)]
    order = as_called([message for message, _ in weighted])
    return [weighted[i][0] for i in order], tuple(weighted[i][1] for i in order)


def as_called(messages: Sequence[Message]) -> list[int]:
    """The order of messages in which the results of several calls stand as the calls do, where all name theirs: by its
    id, or where there are none by its function, as Ollama's clients do.

    Most templates write no ids: to the model the first result is the first call's.
    """
    order = list(range(len(messages)))
    for at, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            continue
        results = list(takewhile(lambda one: one["role"] == "tool", messages[at + 1 :]))
        ids = dict.fromkeys(call.get("id") for call in calls)
        named = [result.get("tool_call_id") for result in results]
        if {*ids, *named} == {None}:
            ids = dict.fromkeys(call["function"]["name"] for call in calls)
            named = [name if isinstance(name := result.get("name"), str) else None for result in results]
        if None not in named and set(named) <= ids.keys() and len(set(named)) == len(named):
            order[at + 1 : at + 1 + len(results)] = [at + 1 + named.index(id) for id in ids if id in named]
    return order


def in_rows(value: Any) -> Any:
    """What a text spells as JSON, or the value; and messages that stand in columns, {"role": [...], "content": [...]},
    as `datasets` reads a sequence, in rows."""
    value = parsed(value)
    if not isinstance(value, Mapping) or not all(isinstance(column, list | tuple) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def spelled(value: Any, name: str, where: str) -> Any:
    """The messages that a text spells as JSON; any other value as it is. Raises FormatError, naming the place, for
    messages as Python prints them."""
    if isinstance(value, str) and _PYTHON.match(value):
        raise FormatError(
            f"{where}: '{name}' holds messages as Python prints them, and not as JSON.",
            "write the rows as JSON: of a frame, to_json('train.jsonl', orient='records', lines=True).",
        )
    read = parsed(value)
    speak = isinstance(read, list) and read and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in read)
    return read if speak else value


def earlier(history: Any) -> list[Message]:
    """The turns of a `history`, a list of questions with their answers; none of anything else."""
    pairs = parsed(history)
    if not isinstance(pairs, list | tuple):
        return []
    if not all(isinstance(pair, list | tuple) and [*map(type, pair)] == [str, str] for pair in pairs):
        return []
    return [turn(role, said) for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]


def turn(role: str, content: str) -> Message:
    """One message of plain text."""
    return {"role": role, "content": content}


def tools_of(value: Any, where: str, name: str = "tools") -> list[Any] | None:
    """The tools of a row: a list of objects, each or all of them as JSON text, too. None where there are none."""
    value = parsed(value)
    if is_missing(value) or value == "":
        return None
    value = plain(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise FormatError(f"{where}: '{name}' must be a list of tools, not {kind(value)}.")
    return [_tool(plain(parsed(tool)), name, where) for tool in value] or None


def _tool(tool: Any, name: str, where: str) -> dict[str, Any]:
    """A tool as a server tells of it: {"type": "function", "function": {...}}; one that is no function as it is."""
    if not isinstance(tool, dict):
        raise FormatError(f"{where}: a tool in '{name}' must be an object, not {kind(tool)}.")
    if "function" not in tool and tool.get("type", "function") == "function":
        tool = {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        function["parameters"] = parsed(function["parameters"])
    return tool


def _message(value: Any, name: str, where: str) -> tuple[Message, int]:
    value = parsed(value)
    if not isinstance(value, Mapping):
        raise FormatError(f"{where}: {name} must be an object, not {kind(value)}.")
    given = _in_usual_names(value, name, where)
    message = plain(given)
    if partly := next((field for field in PARTLY if message.get(field)), None):
        raise FormatError(
            f"{where}: {name} has '{partly}', and a turn is trained whole or not at all.",
            "make several turns of it, or leave the field out.",
        )
    weight = min(_weight(message.pop(field, 1), name, where) for field in WEIGHTS)
    older, calls = (_calls(message.pop(field, None), name, where) for field in ("function_call", "tool_calls"))
    said = [call["function"] for call in calls]
    if calls := [*calls, *(call for call in older if call["function"] not in said)]:
        message["tool_calls"] = calls
    ids = [message.get("tool_call_id"), *(call.get("id") for call in message.get("tool_calls", []))]
    if not all(isinstance(id, str | int | None) for id in ids):
        raise FormatError(f"{where}: the id of a tool call of {name} must be text.")
    _set_content(message, given, name, where)
    return message, weight


def _in_usual_names(value: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The message with `role` and `content`, such as ShareGPT's {"from": "human", "value": "..."}."""
    called = "role" if not is_missing(value.get("role")) else "from"
    speaker = value.get(called)
    if is_missing(speaker) or (called == "role" and not isinstance(speaker, str)):
        raise FormatError(f"{where}: {name} has no 'role'.", 'a message is {"role": "user", "content": "..."}.')
    known = None if called == "role" and speaker in OWN_ROLES else SPEAKERS.get(str(speaker).lower())
    if called == "from" and known is None:
        raise FormatError(f"{where}: {name} is 'from' {speaker!r}, who is unknown.", f"known: {', '.join(SPEAKERS)}.")
    there = [field for field in CONTENTS if field in value]
    field = next((field for field in there if not is_missing(value[field])), next(iter(there), None))
    rest = {key: item for key, item in value.items() if key not in ("role", "from", field)}
    said = {} if field is None else {"content": value[field]}
    if str(speaker).lower() in CALLING:
        said = {"content": None, "tool_calls": said.get("content")}
    return rest | {"role": known or speaker} | said


def _weight(value: Any, name: str, where: str) -> int:
    if value not in (0, 1):
        raise FormatError(f"{where}: the weight of {name} must be 0 or 1, not {str(value)[:40]!r}.")
    return int(value)


def _calls(value: Any, name: str, where: str) -> list[Message]:
    value = parsed(value) or []
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise FormatError(f"{where}: 'tool_calls' of {name} must be a list, not {kind(value)}.")
    return [_call(parsed(call), name, where) for call in calls]


def _call(value: Any, name: str, where: str) -> Message:
    call = dict(value) if isinstance(value, Mapping) else {}
    function = parsed(call.get("function"))
    if not isinstance(function, dict):  # {"name", "arguments"} alone
        function = {key: call.pop(key) for key in ("name", *ARGUMENTS) if key in call}
    given = [function.pop(key) for key in ARGUMENTS if key in function]
    if not isinstance(function.get("name"), str):
        hint = 'a call is {"type": "function", "function": {"name": "...", "arguments": {...}}}.'
        raise FormatError(f"{where}: a tool call of {name} has no 'name'.", hint)
    arguments = parsed(next((value for value in given if value not in (None, "")), {}))
    if isinstance(arguments, str):
        hint = 'they are an object, or its JSON text: "{\\"city\\": \\"Oslo\\"}".'
        raise FormatError(f"{where}: the arguments of a tool call of {name} are no JSON: {arguments[:40]!r}.", hint)
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def _set_content(message: Message, given: Mapping[str, Any], name: str, where: str) -> None:
    content = message.get("content")
    if not isinstance(given.get("content"), str | list | tuple | Mapping | None):
        raise FormatError(f"{where}: 'content' of {name} must be text, not {kind(given['content'])}.")
    if message["role"] == "tool" and isinstance(content, dict | list) and not _is_text(content):
        content = json.dumps(content, ensure_ascii=False)  # a result as an object is told as JSON
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        content = _joined(content, message, name, where)
    if not content and isinstance(message.get("refusal"), str):
        content = message.pop("refusal")
    if content is None:
        if "content" not in given and not message.get("tool_calls") and not thoughts(message):
            raise FormatError(f"{where}: {name} has no 'content'.", 'an empty one is written "".')
        content = None if "tool_calls" in message else ""
    message["content"] = content


def _is_text(content: Any) -> bool:
    """Whether these are parts of a text, or of one with pictures, and no value of somebody's."""
    parts = content if isinstance(content, list) else [content]
    kinds = [part.get("type") if isinstance(part, dict) else part for part in parts if not isinstance(part, str)]
    known = (*TEXT_PARTS, *THOUGHT_PARTS, "image", "audio", "video", "file")
    return all(isinstance(one, str) and any(word in one for word in known) for one in kinds)


def _joined(parts: list[Any], message: Message, name: str, where: str) -> str:
    """The text of a list of parts; thoughts among them go to `reasoning_content`."""
    texts, thoughts = [], []
    for part in parts:
        what = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (what in TEXT_PARTS or (what is None and "text" in part)):
            texts.append(part.get(what if what in part else "text", ""))
        elif what in THOUGHT_PARTS:
            thought = part.get(what, part.get("text", ""))
            thoughts.append(_joined(thought, {}, name, where) if isinstance(thought, list) else thought)
        else:
            shown = f"a part of type {what!r}" if isinstance(what, str) else kind(part)
            raise FormatError(
                f"{where}: {name} holds {shown}, and only text can be trained.",
                "leave the row out, or keep its text parts.",
            )
    if not all(isinstance(text, str) for text in (*texts, *thoughts)):
        raise FormatError(f"{where}: a part of {name} must hold text.")
    if thoughts:
        field = "thinking" if message.get("reasoning_content") else "reasoning_content"
        message[field] = "".join(thoughts)
    return "".join(texts)
