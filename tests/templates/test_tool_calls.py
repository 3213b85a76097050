"""How models write calls, found by rendering: each family's form, read back as it was written."""

import pytest
from helpers.chat_families import FAMILIES, chat_tokenizer

from mlx_adapters.templates.tool_calls import HERMES, tool_format, with_tools

OBJECT = {"city": 'Paris } " x', "list": [1, {"a": None}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
FORMS = {
    "qwen3": '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
    "qwen2": '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
    "llama3": '{"name": "look", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {}}]',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "r1": "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>look\n```json\n{}\n```<|tool_call_end|>"
    "<|tool_calls_end|>",
    "harmony": " to=functions.look<|channel|>commentary json<|message|>{}",
    "apertus": '<|tools_prefix|>[{"look": {}}]',
}


@pytest.mark.parametrize("family", FORMS)
def test_the_form_of_a_call_is_found_by_rendering_one(family):
    format = tool_format(chat_tokenizer(family))
    assert format.form.written("look", {}) == FORMS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_form_writes_is_read_back(family):
    format = tool_format(chat_tokenizer(family))
    start, end = format.marks
    text = format.form.written("look", OBJECT).strip()
    inner = text.removeprefix(start).removesuffix(end)
    (call,) = format.calls(inner, [TOOL])
    assert (call["name"], call["arguments"]) == ("look", OBJECT)
    if format.form.joint is not None:
        first = format.form.written("look", OBJECT).removesuffix(format.form.after)
        both = format.form.read(f"{first}{format.form.joint}look{format.form.between}{{}}{format.form.after}")
        assert [call["arguments"] for call in both] == [OBJECT, {}]


@pytest.mark.parametrize("family", ["chatml", "gemma3", "alpaca", "r1"])
def test_a_template_that_knows_no_tools_gets_them_as_text(family):
    tokenizer = chat_tokenizer(family)
    format = tool_format(tokenizer)
    call = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "seen", "tool_call_id": "1"},
    ]
    given, tools = with_tools(messages, [TOOL], format)
    assert tools is None and given[0]["role"] == "system" and '"name": "look"' in given[0]["content"]
    assert format.form.written("NAME", {"ARGUMENT": "VALUE"}) in given[0]["content"]
    text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    assert "seen" in text and '{"a": 1}' in text
    assert (format.form is HERMES) == (family != "r1")


def test_another_template_decides_for_itself():
    tokenizer = chat_tokenizer("qwen3")
    assert tool_format(tokenizer, tokenizer.chat_template).parser is not None
    assert tool_format(tokenizer, chat_tokenizer("chatml").chat_template).told is False
