"""Whatever is written under a grammar is a call or a JSON text of the schema."""

import json

import numpy as np
import pytest
from helpers.chat_families import FAMILIES, chat_tokenizer

from mlx_adapters.answers.constraints import Grammar, Grammars
from mlx_adapters.answers.reading import Answer, AnswerReader
from mlx_adapters.answers.schemas import answer_grammar, call_rules, check_schema, json_rule
from mlx_adapters.errors import ConfigError, ModelError
from mlx_adapters.templates.tool_calls import tool_format

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PERSON}} for name in ("look", "sea-rch")]


def walk(constraint, ends, rng, most=400):
    """Random tokens that the constraint allows, until it ends or one of `ends` is drawn."""
    tokens = []
    while not constraint.ended and len(tokens) < most:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        token = int(rng.choice(np.nonzero(bits)[0]))
        if token in ends:
            break
        tokens.append(token)
        constraint.accept(token)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_random_calls_are_calls(family):
    tokenizer, rng = chat_tokenizer(family), np.random.default_rng(0)
    grammars, format = Grammars(tokenizer, 600), tool_format(tokenizer)
    for many in (False, True):
        grammar = Grammar(answer_grammar(calls=call_rules(TOOLS, format, grammars.special, many)))
        tokens = walk(grammars.constraint(grammar), tokenizer.eos_token_ids, rng)
        answer = Answer(AnswerReader(tokenizer, format, TOOLS))
        answer.add(tokenizer.decode(tokens), "stop")
        assert answer.calls and (many or len(answer.calls) == 1)
        for call in answer.calls[: 1 if len(tokens) == 400 else None]:
            person = json.loads(call.arguments)
            assert call.name in ("look", "sea-rch") and 0 <= person["age"] <= 99 and len(person["name"]) <= 5


def test_random_json_is_of_the_schema():
    tokenizer, rng = chat_tokenizer("qwen3"), np.random.default_rng(1)
    grammars = Grammars(tokenizer, 600)
    for _ in range(5):
        tokens = walk(grammars.constraint(Grammar(answer_grammar(json_rule(PERSON)))), (), rng)
        assert set(json.loads(tokenizer.decode(tokens))) == {"name", "age"}


def test_a_grammar_begins_after_the_reasoning():
    tokenizer = chat_tokenizer("qwen3")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    (think,), (end,) = encode("<think>"), encode("</think>")
    text = answer_grammar(json_rule({"const": 1}), space=True)
    grammars = Grammars(tokenizer, 600)
    within = grammars.constraint(Grammar(text, after=(end,)))
    free = grammars.constraint(Grammar(text, after=(end,), unless=think))
    first = np.unpackbits(free.mask().view(np.uint8), bitorder="little")
    assert first[think] and first[encode("1")[0]] and not first[encode("a")[0]]
    free.accept(think)
    for one in (within, free):
        for token in encode("What?"):  # it does not end before what must come has come
            before = np.unpackbits(one.mask().view(np.uint8), bitorder="little")
            assert sorted(np.nonzero(before == 0)[0]) == sorted(tokenizer.eos_token_ids) != []
            one.accept(token)
        one.accept(end)
        assert one.mask() is not None and not one.ended
        one.accept(encode("1")[0])
        assert one.ended
    with pytest.raises(ModelError, match="does not go on"):
        grammars.constraint(Grammar(text)).accept(encode("a")[0])


def test_a_call_that_was_begun_freely_is_finished_by_the_grammar():
    tokenizer, rng = chat_tokenizer("qwen3"), np.random.default_rng(2)
    grammars, format = Grammars(tokenizer, 600), tool_format(tokenizer)
    (mark,) = tokenizer.encode("<tool_call>", add_special_tokens=False)
    rules = call_rules(TOOLS, format, grammars.special, True, begun=True)
    constraint = grammars.constraint(Grammar(answer_grammar(calls=rules), after=(mark,), repeats=True))
    tokens = list(tokenizer.encode("Well: ", add_special_tokens=False))
    for token in tokens:
        assert constraint.mask() is None
        constraint.accept(token)
    for _ in range(2):
        constraint.accept(mark)
        tokens.append(mark)
        while (mask := constraint.mask()) is not None:
            allowed = np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0]
            tokens.append(int(rng.choice([one for one in allowed if one not in tokenizer.eos_token_ids])))
            constraint.accept(tokens[-1])
            if len(tokens) > 150 and tokenizer.decode(tokens[-1:]).endswith("</tool_call>"):
                break
        if len(tokens) > 150:
            break
    answer = Answer(AnswerReader(tokenizer, format, TOOLS))
    answer.add(tokenizer.decode(tokens), "stop")
    assert answer.calls and answer.content == "Well:"


@pytest.mark.parametrize(
    ("schema", "place", "why"),
    [
        ({"type": "objct"}, "s", "Invalid type"),
        (
            {"type": "object", "properties": {"a": {"anyOf": [{}, {"type": "strng"}]}}},
            "s.properties.a.anyOf[1]",
            "strng",
        ),
        ({"$ref": "#/nope"}, "s", "nope"),
        ({"type": "array", "items": {"type": "string", "pattern": "(("}}, "s.items", "regex"),
        ({"type": "array", "items": {"not": {}}}, "s.items", "not"),
        ([], "s", "must be a JSON schema"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(schema, place, why):
    with pytest.raises(ConfigError) as caught:
        check_schema(schema, "s", True)
    assert why in caught.value.message and f"'{place}'" in caught.value.message


def test_what_no_grammar_can_hold_is_left_to_the_model_unless_strictness_is_asked_for():
    loose = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "odd"}}
    check_schema(loose, "s", False)
    with pytest.raises(ConfigError, match="uniqueItems"):
        check_schema(loose, "s", True)
