"""What a template takes is found by trying: roles, arguments as text, calls without content, arguments of its own."""

import pytest
from helpers.chat_families import chat_tokenizer, plain

from mlx_adapters.errors import ConfigError
from mlx_adapters.templates.habits import check_arguments, fitted, thoughts

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "ü"}}}]}
TEXT = '{%- for m in messages %}{{ m.role }}:{{ m.content or "" }}{%- for c in m.tool_calls or [] %}'
ENDS = "{%- endfor %};{%- endfor %}"
AS_TEXT = TEXT + "{{ '[' + c.function.arguments + ']' }}" + ENDS  # as DeepSeek V3 joins them
PRINTED = TEXT + "[{{ c.function.arguments }}]" + ENDS  # an object would look like Python's
AS_JSON = TEXT + "[{{ c.function.arguments | tojson }}]" + ENDS
NEEDS_CONTENT = AS_JSON.replace('{{ m.content or "" }}', "{{ m.content + '' }}")
KNOWS_DEVELOPER = (
    "{%- for m in messages %}{%- if m.role in ('system', 'developer') %}<rules>{{ m.content }}</rules>"
    "{%- elif m.role in ('user', 'assistant') %}{{ m.content }};{%- endif %}{%- endfor %}"
)
NO_DEVELOPER = KNOWS_DEVELOPER.replace("('system', 'developer')", "('system',)")


def rendered(template: str, *messages) -> str:
    tokenizer = chat_tokenizer("chatml", template)
    return tokenizer.apply_chat_template(fitted(messages, tokenizer), tokenize=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (AS_TEXT, 'assistant:[{"a": "ü"}];'),
        (PRINTED, 'assistant:[{"a": "ü"}];'),
        (AS_JSON, 'assistant:[{"a": "ü"}];'),
        (NEEDS_CONTENT, 'assistant:[{"a": "ü"}];'),
    ],
)
def test_calls_come_as_the_template_takes_them(template, expected):
    assert rendered(template, CALL) == expected


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "alpaca"])
def test_a_developer_is_the_system_where_the_template_knows_none(family):
    tokenizer = chat_tokenizer(family, plain(family))
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert [m["role"] for m in fitted(messages, tokenizer)] == ["system", "user"]
    assert messages[0]["role"] == "developer"  # the caller's own are as they were


def test_a_developer_stays_where_the_template_knows_it():
    told = {"role": "developer", "content": "Be brief."}
    assert rendered(KNOWS_DEVELOPER, told) == rendered(NO_DEVELOPER, told) == "<rules>Be brief.</rules>"
    assert fitted([told], chat_tokenizer("chatml", KNOWS_DEVELOPER)) == [told]
    assert fitted([told], chat_tokenizer("chatml", NO_DEVELOPER)) == [{**told, "role": "system"}]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_that_is_refused_goes_before_the_first_question(role):
    told, asked, said = (
        {"role": role, "content": "Be brief."},
        {"role": "user", "content": "a"},
        CALL | {"content": "b"},
    )
    gemma = chat_tokenizer("gemma2")
    assert fitted([told, asked], gemma) == [{"role": "user", "content": "Be brief.\n\na"}]
    assert fitted([told, told, asked], gemma) == [{"role": "user", "content": "Be brief.\n\nBe brief.\n\na"}]
    assert fitted([told | {"content": " "}, asked], gemma) == [asked]
    assert [m["role"] for m in fitted([told, asked], chat_tokenizer("chatml"))] == ["system", "user"]
    for odd in ([told], [told, said], [asked, said, told]):  # to be refused as they are
        assert [m["role"] for m in fitted(odd, gemma)] == [m["role"].replace("developer", "system") for m in odd]


def test_another_template_than_the_tokenizers_is_asked_itself():
    tokenizer = chat_tokenizer("chatml", AS_JSON)
    assert isinstance(fitted([CALL], tokenizer)[0]["tool_calls"][0]["function"]["arguments"], dict)
    assert isinstance(fitted([CALL], tokenizer, AS_TEXT)[0]["tool_calls"][0]["function"]["arguments"], str)


def test_an_argument_that_no_template_reads_is_refused():
    tokenizer = chat_tokenizer("qwen3", plain("qwen3"))
    check_arguments(tokenizer, {"enable_thinking": False})
    with pytest.raises(ConfigError, match="reads no 'enable_thinkin'") as error:
        check_arguments(tokenizer, {"enable_thinkin": False})
    assert "enable_thinking" in error.value.hint


# What templates read thoughts from: one field or another, or the content's parts.
WRITES = "{%- for m in messages %}{% set t = THOUGHT %}{{ '(' + t + ')' if t }}{{ m.content or '' }};{% endfor %}"
IN_PARTS = (
    "{%- for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '(' + part.thinking + ')' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %};{% endfor %}"
)
READS = {
    "reasoning_content": WRITES.replace("THOUGHT", "m.reasoning_content"),
    "thinking": WRITES.replace("THOUGHT", "m['thinking']"),
    "reasoning": WRITES.replace("THOUGHT", "m.get('reasoning')"),
    "thought": WRITES.replace("THOUGHT", "m.thought"),
    "thoughts_text": WRITES.replace("THOUGHT", "m.thoughts_text"),
    "content": IN_PARTS,
}
THOUGHT = "I add."
CARRIED = [
    {"reasoning_content": THOUGHT},
    {"thinking": THOUGHT},
    {"reasoning": THOUGHT},
    {"thought": THOUGHT},
    {"chain_cot": THOUGHT},
    {"reasoning_details": [{"type": "reasoning.text", "text": "I "}, {"type": "reasoning.text", "text": "add."}]},
    {"thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]},
    {"reasoning": THOUGHT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
]


@pytest.mark.parametrize("field", READS)
@pytest.mark.parametrize("carried", CARRIED, ids=lambda carried: "+".join(carried))
def test_a_thought_goes_where_the_template_reads_it_whatever_its_name(field, carried):
    answer = {"role": "assistant", "content": "4.", **carried}
    assert rendered(READS[field], {"role": "user", "content": "a"}, answer) == f"a;({THOUGHT})4.;"


def test_thoughts_are_told_by_the_names_of_their_fields():
    message = {"role": "assistant", "content": "4.", "finish_reason": "stop", "reasoning_effort": "high", "thinks": "x"}
    assert thoughts(message) == {}
    assert thoughts({**message, "reasoning": " ", "thought": "a", "reasoning_content": "b"}) == {
        "reasoning_content": "b",
        "thought": "a",
    }
    assert thoughts({"role": "user", "content": "a", "thought": "b"}) == {}


def test_of_two_thoughts_the_first_counts_and_the_other_stays_to_be_told():
    answer = {"role": "assistant", "content": "4.", "reasoning": "x", "thought": "y"}
    tokenizer = chat_tokenizer("chatml", READS["thinking"])
    assert fitted([answer], tokenizer) == [{"role": "assistant", "content": "4.", "thought": "y", "thinking": "x"}]


@pytest.mark.parametrize(
    "template", [plain("chatml"), IN_PARTS.replace("part.thinking", "part"), TEXT + ENDS, "{% for m in messages %}"]
)
def test_a_template_that_reads_no_thoughts_gets_the_message_as_it_is(template):
    answer = {"role": "assistant", "content": "4.", "thinking": "x"}
    assert fitted([answer], chat_tokenizer("chatml", template)) == [answer]
    parts = "{%- for m in messages %}{{ m.content }};{% endfor %}"  # a list would be printed as Python shows it
    assert fitted([answer], chat_tokenizer("chatml", parts)) == [answer]


def test_a_thought_that_is_written_beside_a_call_alone_is_found_too():
    template = (
        "{%- for m in messages %}{{ m.content or '' }}{% if m.tool_calls %}({{ m.thought }}){% endif %};{% endfor %}"
    )
    assert rendered(template, CALL | {"thinking": THOUGHT}) == f"({THOUGHT});"
