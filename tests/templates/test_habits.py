"""What a template takes is found by trying: roles, arguments as text, calls without content, arguments of its own."""

import pytest
from helpers.chat_families import chat_tokenizer, plain

from mlx_adapters.errors import ConfigError
from mlx_adapters.templates.habits import check_arguments, fitted

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
