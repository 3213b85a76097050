"""The messages and tools of a chat, in the one form that `rows.messages` gives conversations for training.

So a model that was trained on conversations with tools sees the same text here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_adapters.answers.schemas import check_arguments
from mlx_adapters.errors import FormatError
from mlx_adapters.protocols.errors import ApiError, told_as
from mlx_adapters.protocols.fields import EMPTY, Fields
from mlx_adapters.rows.messages import as_called, conversation, tools_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
NAME = re.compile(r"[^\s\"'{}\[\]\\<>|]{1,128}")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
Choice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Conversation:
    """What a chat asks for beside the sampling.

    `tools` are those that may be called: none for the choice "none", some that are allowed, one alone if it is asked
    for by name; then the choice is "required". `arguments` are for the chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    choice: Choice
    parallel: bool
    arguments: dict[str, Any]


def read_conversation(fields: Fields) -> Conversation:
    """The checked conversation of a chat's fields. Raises ApiError 400."""
    messages = read_messages(fields.value("messages"))
    functions = fields.value("functions")
    tools = read_tools(_as_tools(functions) if has_functions(fields) else fields.value("tools"))
    tools, choice, parallel = read_choice(fields, tools)
    parallel = parallel and not has_functions(fields)
    return Conversation(messages, tools, choice, parallel, read_template_arguments(fields))


def has_functions(fields: Fields) -> bool:
    """Whether a chat speaks of functions, as OpenAI's API did before it had tools: an answer may call one."""
    return bool(fields.value("functions")) and not fields.value("tools")


def read_messages(value: Any, where: str = "messages") -> list[dict[str, Any]]:
    """The checked messages of a chat, contents as plain text. Raises ApiError 400."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"'{where}' must be a list with at least one message.", param=where)
    messages = [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]
    return [messages[i] for i in as_called(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object.", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"'{where}.role' must be one of {', '.join(ROLES[:5])}.", param=f"{where}.role")
    known = {"role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call", "reasoning_content"}
    known |= {"reasoning", "id", "status", "type", "annotations", "prefix"}
    for name in message.keys() - known:
        if message[name] not in (None, "", [], {}, False):
            raise ApiError(400, f"'{where}' has '{name[:100]}', which this server does not support.", param=where)
    for part in message["content"] if isinstance(message.get("content"), list) else []:
        if not _is_text(part):
            raise ApiError(400, f"'{where}.content' may hold parts of type 'text' only.", param=f"{where}.content")
    content, calls = message.get("content"), message.get("tool_calls") or message.get("function_call")
    kinds = str | list | dict if role == "tool" else str | list  # a result that is an object is told as JSON
    if not (isinstance(content, kinds) and content != []) and not (content in (None, []) and calls):
        raise ApiError(400, f"'{where}.content' must be a string.", param=f"{where}.content")
    kept = {key: value for key, value in message.items() if key in known - {"refusal", "annotations", "status", "type"}}
    try:
        (read,), _ = conversation([kept], where)
    except FormatError as error:
        raise ApiError(400, error.message[:300], param=where) from None
    if "reasoning" in read:
        read.setdefault("reasoning_content", read.pop("reasoning"))
    for call in read.get("tool_calls", []):
        if not isinstance(call["function"].get("arguments"), dict):
            raise ApiError(400, f"'{where}.tool_calls' has arguments that are no JSON object.", param=where)
    return read


def _is_text(part: Any) -> bool:
    kinds = ("text", "input_text", "output_text", "refusal")
    return (
        isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text", part.get("refusal")), str)
    )


def _as_tools(value: Any) -> Any:
    """OpenAI's older `functions`."""
    return [{"type": "function", "function": one} for one in value] if isinstance(value, list) else value


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The checked tools. Raises ApiError 400."""
    if value in EMPTY:
        return []
    if not isinstance(value, list):
        raise ApiError(400, "'tools' must be a list.", param="tools")
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise ApiError(400, f"'{where}' must be of type 'function' and hold a 'function'.", param=where)
        if not isinstance(function.get("name"), str) or not NAME.fullmatch(function["name"]):
            raise ApiError(
                400, f"'{where}.function.name' must be a name without spaces, quotes or brackets.", param=where
            )
        schema = function.get("parameters")
        if not isinstance(schema, dict | None):
            raise ApiError(400, f"'{where}.function.parameters' must be a JSON schema.", param=where)
        kinds = (schema or {}).get("type")
        if kinds not in (None, "object") and not (isinstance(kinds, list) and "object" in kinds):
            raise ApiError(400, f"'{where}.function.parameters' must be the schema of an object.", param=where)
        if function.get("strict"):
            with told_as(f"{where}.function.parameters"):
                check_arguments(tool, f"{where}.function.parameters")
    names = [tool["function"]["name"] for tool in value]
    if len(set(names)) < len(names):
        raise ApiError(400, "'tools' names a function twice.", param="tools")
    return tools_of(value, "the request") or []


def read_choice(fields: Fields, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Choice, bool]:
    """The tools that may be called, whether one must be, and whether several at once. Raises ApiError 400."""
    older, parallel = fields.value("function_call"), fields.take("parallel_tool_calls", bool, True)
    choice = older if fields.value("tool_choice") is None else fields.value("tool_choice")
    if not isinstance(choice, Mapping):
        return *_by_word(tools, choice), parallel
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)  # /v1/responses has its fields beside the type
        given, mode = (allowed.get("tools"), allowed.get("mode")) if isinstance(allowed, Mapping) else (None, None)
        if not isinstance(given, list) or not given or mode not in ("auto", "required"):
            why = "'tool_choice' allows tools by a list 'tools' and a 'mode', 'auto' or 'required'."
            raise ApiError(400, why, param="tool_choice")
        return *_by_word([_named(tools, one) for one in given], mode), parallel
    return [_named(tools, choice)], "required", False


def _by_word(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], Choice]:
    if choice in (*EMPTY, "auto") or (choice == "none" and not tools):
        return tools, "auto"
    if choice == "none":
        return [], "none"
    if choice not in ("required", "any"):
        why = "'tool_choice' must be 'none', 'auto', 'required', name a function or be of the type 'allowed_tools'."
        raise ApiError(400, why, param="tool_choice")
    if not tools:
        raise ApiError(400, "'tool_choice' asks for a call, and there are no 'tools'.", param="tool_choice")
    return tools, "required"


def _named(tools: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    """The tool that a choice names."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ApiError(400, "'tool_choice' must name a function.", param="tool_choice")
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        raise ApiError(400, f"'tool_choice' names '{name[:100]}', which is not among 'tools'.", param="tool_choice")
    return named[0]


def read_template_arguments(fields: Fields) -> dict[str, Any]:
    """What a chat gives its template beside the messages. Raises ApiError 400."""
    arguments = dict(fields.take("chat_template_kwargs", dict, {}))
    thinking = fields.take("enable_thinking", bool)
    effort = fields.take("reasoning_effort", str)
    if effort is not None and effort not in EFFORTS:
        called = fields.name("reasoning_effort")
        raise ApiError(400, f"'{called}' must be one of {', '.join(EFFORTS)}.", param=called)
    for name, value in (("enable_thinking", thinking), ("reasoning_effort", effort)):
        if value is not None and arguments.setdefault(name, value) != value:
            called = fields.name(name)
            raise ApiError(400, f"'{called}' and 'chat_template_kwargs.{name}' are not the same.", param=called)
    if effort == "none":  # templates of either kind: those with levels, and those that think or do not
        arguments.setdefault("enable_thinking", False)
    return arguments
