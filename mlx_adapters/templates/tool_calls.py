"""How a model writes tool calls and is told of tools, found by rendering a small conversation and looking at it.

mlx-lm has a parser for each kind of model, which is asked where it has one. Beside it the *form* of a call is found:
the template writes a call of our own, whose name and arguments are then searched in the text. So calls can be enforced
by a grammar, and be read of models that mlx-lm has no parser for. A template that knows nothing of tools gets them as
text, in the form that most models were trained on.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.system.door import TokenizerWrapper, ToolParser, tool_parser_of
from mlx_adapters.templates.habits import ASK, OTHER, WORD, Messages, fitted

NAMES, OBJECTS = ("lookalpha", "lookomega"), ({WORD: OTHER}, {WORD: "heron"})
TOLD = """You may call functions. They are described here as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON, in this form:
{example}"""


@dataclass(frozen=True)
class CallForm:
    """The text of calls: `before` NAME `between` ARGUMENTS `after`, with `joint` in place of `after` and `before` where
    another call follows. `joint` None: there is one call alone. The arguments are a JSON object."""

    before: str
    between: str
    after: str
    joint: str | None = None

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of one call."""
        return f"{self.before}{name}{self.between}{json.dumps(arguments, ensure_ascii=False)}{self.after}"

    def read(self, text: str) -> list[dict[str, Any]]:
        """The calls in a text that begins with `before`; `after` may be missing. Raises ValueError."""
        calls, rest, decoder = [], text.strip(), json.JSONDecoder()
        head = self.before.strip()
        while rest.startswith(head):
            name, between, rest = rest[len(head) :].partition(self.between.rstrip())
            if not between:
                break
            arguments, end = decoder.raw_decode(rest := rest.lstrip())
            calls.append({"name": name.strip(), "arguments": arguments})
            rest, head = rest[end:], self.before.strip() if self.joint is None else self.joint
        if not calls or self.after.strip() not in (rest.strip(), ""):
            raise ValueError("this is no call")
        return calls


HERMES = CallForm(
    '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", '}\n</tool_call>\n<tool_call>\n{"name": "'
)


@dataclass(frozen=True)
class ToolFormat:
    """How one model with one template calls tools.

    `parser`: mlx-lm's, with the marks around a call; None where it has none. `form`: None where the template writes
    arguments otherwise than as JSON. `told`: the template tells the model which tools there are.
    """

    parser: ToolParser | None
    form: CallForm | None
    told: bool

    @property
    def marks(self) -> tuple[str, str]:
        """What begins a call, and what ends it, "" for the end of the answer."""
        if self.parser is not None:
            return self.parser.start, self.parser.end
        form = self.form or HERMES
        apart = form.joint is None or form.joint.startswith(form.after)
        ends = apart and any(letter.isalpha() for letter in form.after)  # braces alone may end an argument
        return form.before.strip(), form.after.strip() if ends else ""

    def calls(self, inner: str, tools: Sequence[Any]) -> list[dict[str, Any]]:
        """The calls of a text between the marks: {"name", "arguments"} and an "id", if the model gives one.

        Raises whatever the parser does.
        """
        if self.parser is None:
            start, end = self.marks
            return (self.form or HERMES).read(start + inner + end)
        parsed = self.parser.parse(inner, list(tools))
        return parsed if isinstance(parsed, list) else [parsed]


def tool_format(tokenizer: TokenizerWrapper, template: str | None = None) -> ToolFormat:
    """The format of a tokenizer's model, with its own chat template or with another one's text."""
    return _format(tokenizer, template)


@functools.lru_cache(maxsize=32)
def _format(tokenizer: TokenizerWrapper, template: str | None) -> ToolFormat:
    told = WORD in _rendered(tokenizer, template, [ASK], [_tool(WORD)])
    parser = tool_parser_of(tokenizer, template)
    forms = (_form(tokenizer, template, parser, id) for id in ("call0000{}", "functions.{name}:{}"))
    form = next((form for form in forms if form is not None), None)
    if form is None and not (told and parser):
        return ToolFormat(None, HERMES, False)
    return ToolFormat(parser, form, told)


def _form(tokenizer: TokenizerWrapper, template: str | None, parser: ToolParser | None, id: str) -> CallForm | None:
    calls = [_call(name, id.format(i, name=name), OBJECTS[i]) for i, name in enumerate(NAMES)]
    one, two = (
        _rendered(tokenizer, template, [ASK, {"role": "assistant", "content": "", "tool_calls": calls[:n]}])
        for n in (1, 2)
    )
    name, arguments = NAMES[0], next((j for j in _spellings(OBJECTS[0]) if j in one), "")
    at = one.find(name)
    if at < 0 or not arguments or one.find(arguments) < at or one.count(name) != 1:
        return None
    before = one[_turn(one, _rendered(tokenizer, template, [ASK], generation=True), tokenizer) : at]
    between, after = one[at + len(name) :].split(arguments, 1)
    if parser is not None and parser.start in before:
        before = before[before.rindex(parser.start) :]
    elif tokenizer.has_thinking:
        before = before.rpartition(tokenizer.think_end)[2].lstrip()
    after = _until_the_end(after, tokenizer, parser)
    form = CallForm(before, between, after, _joint(two, before, between, after))
    try:
        format = ToolFormat(parser, form, True)
        start, end = format.marks
        text = form.written(name, OBJECTS[0]).strip()
        (call,) = format.calls(text.removeprefix(start).removesuffix(end), [_tool(name)])
        same = (call["name"], call["arguments"]) == (name, OBJECTS[0])
    except Exception:  # a parser raises what it likes
        return None
    return form if same and text.startswith(start) else None


def _turn(text: str, opening: str, tokenizer: TokenizerWrapper) -> int:
    """Where the text of the answer begins: where it leaves `opening`, but within no token of either."""
    pairs = enumerate(zip(text, opening, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(opening)))
    for token in tokenizer.get_added_vocab():
        for start in range(max(at - len(token) + 1, 0), at):
            if text.startswith(token, start) or opening.startswith(token, start):
                at = start
    return at


def _until_the_end(after: str, tokenizer: TokenizerWrapper, parser: ToolParser | None) -> str:
    """What the model writes itself after the arguments, without the token that ends its turn."""
    if parser is not None and parser.end and parser.end in after:
        return after[: after.index(parser.end) + len(parser.end)]
    ends = [tokenizer.convert_ids_to_tokens(int(token)) for token in tokenizer.eos_token_ids]
    places = [after.find(end) for end in ends if isinstance(end, str) and end in after]
    return after[: min(places)] if places else after.rstrip()


def _joint(text: str, before: str, between: str, after: str) -> str | None:
    """What stands between two calls, if the second is written as the first."""
    for one, other in zip(*map(_spellings, OBJECTS), strict=True):
        first, second = f"{before}{NAMES[0]}{between}{one}", f"{NAMES[1]}{between}{other}{after}"
        if first in text and second in text:
            return text[text.index(first) + len(first) : text.index(second)]
    return None


def _spellings(arguments: Mapping[str, Any]) -> list[str]:
    return [json.dumps(arguments), json.dumps(arguments, separators=(",", ":")), json.dumps(arguments, indent=2)]


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {WORD: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": OTHER, "parameters": parameters}}


def _call(name: str, id: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": dict(arguments)}}


def _rendered(
    tokenizer: TokenizerWrapper, template: str | None, messages: Messages, tools: Any = None, generation: bool = False
) -> str:
    more = {} if template is None else {"chat_template": template}
    try:
        given = fitted(messages, tokenizer, template)
        options = {"tools": tools, "add_generation_prompt": generation, "tokenize": False}
        return str(tokenizer.apply_chat_template(given, **options, **more))
    except Exception:  # a template may raise what it likes
        return ""


def with_tools(
    messages: Messages, tools: Sequence[Any], format: ToolFormat
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages and tools that the template is given.

    One that says nothing of tools gets them in a system message; one that knows no calls gets these and what came of
    them as text, too.
    """
    given = [dict(message) for message in messages]
    if format.told:
        return given, list(tools) or None
    form = format.form or HERMES
    if form is HERMES:
        given = [_as_text(message) for message in given]
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = TOLD.format(tools=lines, example=form.written("NAME", {"ARGUMENT": "VALUE"}))
        first = given[0] if given and given[0]["role"] in ("system", "developer") else None
        if first is not None:
            given[0] = {**first, "content": f"{first['content']}\n\n{text}"}
        else:
            given.insert(0, {"role": "system", "content": text})
    return given, None


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [call["function"] for call in message.pop("tool_calls", None) or []]
    if not calls:
        return message
    texts = [message.get("content"), *(HERMES.written(call["name"], call["arguments"]) for call in calls)]
    return {**message, "content": "\n".join(text for text in texts if text)}
