"""JSON schemas and tool calls as grammars, in llguidance's dialect of Lark.

A schema that cannot be enforced is refused with the place in it; keywords that a grammar cannot hold are left to the
model where the request does not ask for strictness.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.templates.tool_calls import HERMES, ToolFormat

SPACE = r"\n?[ \t]{0,24}"  # between the parts of a JSON text: enough for indentation, and no endless run
CHILDREN = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
CHILD_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
CHILD_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def llguidance() -> Any:
    """The library, with its parts. Raises ConfigError where it is missing."""
    try:
        import llguidance
        import llguidance.hf
        import llguidance.numpy
    except ImportError:
        raise ConfigError("Grammars need llguidance.", "pip install 'mlx_adapters[serve]'.") from None
    return llguidance


def answer_grammar(json: str = "", calls: Sequence[str] = (), space: bool = False) -> str:
    """The grammar of a whole answer: a JSON text, or calls, or either.

    Args:
        json: from `json_rule`.
        calls: from `call_rules`.
        space: there may be space first, as after reasoning.
    """
    either = " | ".join(name for name, there in (("json", json), ("calls", calls)) if there)
    rules = [f"start: {'space ' if space else ''}({either})", *([r"space: /[ \n]{0,4}/"] if space else [])]
    return "\n".join([*rules, *([json] if json else []), *calls, ""])


def json_rule(schema: Mapping[str, Any], strict: bool = True) -> str:
    """A JSON text that the schema allows.

    Args:
        schema: draft 2020-12.
        strict: every keyword is enforced; else those that no grammar can hold are not.
    """
    return f"json: {_json(schema, strict)}"


def call_rules(
    tools: Sequence[Mapping[str, Any]], format: ToolFormat, special: Mapping[str, int], many: bool, begun: bool = False
) -> list[str]:
    """Calls of these tools, as the model writes them.

    Args:
        tools: in OpenAI's form.
        format: the model's; without a form of its own the call is JSON between the usual marks.
        special: the texts and ids of the tokens that a grammar names by their id, from `Grammars.special`.
        many: more than one call, where the form has room for more.
        begun: what follows the mark that begins a call.
    """
    form = format.form or HERMES
    head = form.before.lstrip().removeprefix(format.marks[0]) if begun else form.before
    names = [f"{_literal(t['function']['name'] + form.between, special)} arguments_{i}" for i, t in enumerate(tools)]
    more = f" ({_literal(form.joint, special)} call)*" if many and form.joint is not None else ""
    return [
        f"calls: {_literal(head, special)} call{more} {_literal(form.after, special)}",
        f"call: {' | '.join(names)}",
        *(f"arguments_{i}: {_arguments(tool)}" for i, tool in enumerate(tools)),
    ]


def _arguments(tool: Mapping[str, Any]) -> str:
    function = tool["function"]
    schema = function.get("parameters") or {"additionalProperties": False}
    return _json({**schema, "type": "object"}, bool(function.get("strict")))


def check_arguments(tool: Mapping[str, Any], where: str) -> None:
    """`check_schema` of a tool's parameters, which are an object."""
    function = tool["function"]
    check_schema({**(function.get("parameters") or {}), "type": "object"}, where, bool(function.get("strict")))


def _json(schema: Mapping[str, Any], strict: bool) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE, "lenient": not strict}})


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text in Lark, its special tokens by their ids."""
    positions = [(text.index(token), token) for token in special if token in text]
    if not positions:
        return json.dumps(text, ensure_ascii=False) if text else ""
    at, token = min(positions, key=lambda one: (one[0], -len(one[1])))
    rest = text[at + len(token) :]
    return " ".join(filter(None, [_literal(text[:at], {}), f"<[{special[token]}]>", _literal(rest, special)]))


def check_schema(schema: Any, where: str, strict: bool) -> None:
    """Raise ConfigError for a schema that no grammar can be made of, with the place.

    Args:
        schema: what a client sent.
        where: the place of the schema in the request.
        strict: as for `json_rule`.
    """
    if not isinstance(schema, dict):
        raise ConfigError(f"'{where}' must be a JSON schema, which is an object.")
    why = _refusal(schema, strict)
    if why:
        place = _place(schema, schema, why, strict, 0)
        at = ".".join([where, *place]) if place else where
        raise ConfigError(f"The schema cannot be used: {why} (at '{at}').")


def _refusal(schema: Mapping[str, Any], strict: bool) -> str:
    """Why no grammar can be made of it; "" if one can."""
    matcher = llguidance().LLMatcher
    grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"lenient": not strict})
    why = matcher.validate_grammar(grammar)
    return " ".join(why.split())[:300] if why and not why.startswith("WARNING") else ""


def _place(root: Mapping[str, Any], schema: Mapping[str, Any], why: str, strict: bool, depth: int) -> list[str]:
    """The way to the smallest part that is refused for the same reason."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for way, child in _children(schema) if depth < 32 else ():
        if isinstance(child, dict) and _refusal({**shared, **child}, strict) == why:
            return [*way, *_place(root, child, why, strict, depth + 1)]
    return []


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[list[str], Any]]:
    for key in CHILDREN:
        if key in schema:
            yield [key], schema[key]
    for key in CHILD_LISTS:
        if isinstance(schema.get(key), list):
            yield from (([f"{key}[{i}]"], child) for i, child in enumerate(schema[key]))
    for key in CHILD_MAPS:
        if isinstance(schema.get(key), dict):
            yield from (([key, name], child) for name, child in schema[key].items())
