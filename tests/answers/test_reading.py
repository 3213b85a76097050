"""Answers told apart: reasoning, calls and text, however the pieces fall."""

import json

import pytest
from helpers.chat_families import TOOLS, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.answers.reading import Answer, AnswerReader, ToolCall, is_reasoning, reasoning_marks
from mlx_adapters.templates.tool_calls import tool_format

TOKENIZERS = {family: chat_tokenizer(family) for family in ("qwen3", "mistral", "kimi", "r1", "llama3", "gemma3")}
TEXT = st.text(st.sampled_from("ab <>{}[]\"'\n|/é日"), max_size=20)


def read(family, text, sizes=(1000,), reason="stop", reasoning=False):
    tokenizer = TOKENIZERS[family]
    answer = Answer(
        AnswerReader(tokenizer, tool_format(tokenizer), TOOLS, reasoning_marks(tokenizer), reasoning=reasoning)
    )
    pieces, parts = list(sizes), []
    while text:
        size = pieces.pop(0) if pieces else 1000
        parts += answer.add(text[:size], None)
        text = text[size:]
    parts += answer.add("", reason)
    return answer, parts


def call(family, arguments):
    return tool_format(TOKENIZERS[family]).form.written("get_weather", arguments)


@given(st.sampled_from(sorted(TOKENIZERS)), TEXT, TEXT, st.lists(st.integers(1, 9), max_size=40))
@settings(max_examples=150)
def test_pieces_make_no_difference(family, value, thought, sizes):
    thinks = reasoning_marks(TOKENIZERS[family]) is not None
    text = (f"<think>\n{thought}</think>\n\n" if thinks else "") + call(family, {"city": value})
    whole, _ = read(family, text)
    cut, _ = read(family, text, sizes)
    assert [json.loads(one.arguments) for one in cut.calls] == [{"city": value}]
    assert (cut.content, cut.reasoning, cut.finish_reason) == (whole.content, whole.reasoning, "tool_calls")
    assert not cut.content and cut.reasoning == (thought.strip() if thinks else "")


@given(st.sampled_from(["qwen3", "r1"]), TEXT, TEXT, TEXT, st.booleans(), st.booleans())
@settings(max_examples=150)
def test_tokens_go_with_the_text_that_they_wrote(family, first, thought, text, calls, stopped):
    """Each letter is a token here: none of a mark or of a call is the answer's, none of the reasoning the text's."""
    tokenizer = TOKENIZERS[family]
    answer = Answer(AnswerReader(tokenizer, tool_format(tokenizer), TOOLS, reasoning_marks(tokenizer)))
    written = f"{first}<think>{thought}</think>{text}" + (call(family, {"city": "a"}) if calls else "")
    parts = [part for letter in written for part in answer.add(letter, None, [letter])]
    parts += answer.add("", "stop", ["the stop word's"] if stopped else [])
    assert len(answer.calls) == calls
    told = "".join(answer.tokens).removesuffix("the stop word's")
    assert (len(told) < len("".join(answer.tokens))) == (stopped and not calls)
    assert "".join(told.split()) == "".join(answer.content.split()) == "".join((first + text).split())
    assert "".join(answer.thoughts).strip() == answer.reasoning == thought.strip()
    spoken = [part for part in parts if not isinstance(part, ToolCall)]
    assert all("".join(part.tokens).strip() == part.text.strip() for part in spoken if part.text)


def test_tokens_of_a_call_that_is_none_are_the_texts():
    tokenizer = TOKENIZERS["qwen3"]
    answer = Answer(AnswerReader(tokenizer, tool_format(tokenizer), TOOLS))
    for token in ("I ", "<tool_call>", "nonsense", "</tool_call>", " see"):
        answer.add(token, None, [token])
    answer.add("", "length")
    assert answer.content == "".join(answer.tokens) == "I <tool_call>nonsense</tool_call> see"


@given(TEXT, st.lists(st.integers(1, 5), max_size=30))
@settings(max_examples=100)
def test_an_answer_without_marks_is_the_text_as_it_is(text, sizes):
    answer, parts = read("gemma3", text, sizes)
    assert answer.content == text == "".join(part.text for part in parts) and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "argu',
        "<tool_call>\nnonsense\n</tool_call> and more",
        '<tool_call>{"name": 3}</tool_call>',
    ],
)
def test_what_cannot_be_called_is_text(text):
    answer, _ = read("qwen3", text, [3, 4, 5])
    assert answer.content == text and answer.calls == [] and answer.finish_reason == "stop"


def test_text_before_calls_and_several_calls():
    text = "I look.\n" + call("qwen3", {"city": "a"}) + "\n" + call("qwen3", {"city": "b"})
    answer, _ = read("qwen3", text, [7] * 30)
    assert answer.content == "I look." and [json.loads(c.arguments)["city"] for c in answer.calls] == ["a", "b"]
    assert len({one.id for one in answer.calls}) == 2 and all(one.id.startswith("call_") for one in answer.calls)


def test_ids_of_the_model_are_kept():
    answer, _ = read("kimi", call("kimi", {"city": "a"}))
    assert [one.id for one in answer.calls] == ["functions.get_weather:0"]


def test_an_answer_that_begins_within_the_reasoning():
    answer, parts = read("qwen3", "hm\nso\n</think>\n\nYes. ", [2] * 20, reasoning=True)
    assert (answer.reasoning, answer.content) == ("hm\nso", "Yes. ")
    cut, _ = read("qwen3", "hm\nso", reason="length", reasoning=True)
    assert (cut.reasoning, cut.content, cut.finish_reason) == ("hm\nso", "", "length")
    assert parts[0].kind == "reasoning"


def test_a_prompt_that_ends_in_the_mark_is_within_the_reasoning():
    tokenizer = TOKENIZERS["qwen3"]
    marks, encode = reasoning_marks(tokenizer), tokenizer.encode
    assert is_reasoning(tokenizer, encode("<|im_start|>assistant\n<think>\n"), marks)
    assert not is_reasoning(tokenizer, encode("say <think> to me<|im_end|>"), marks)
    assert not is_reasoning(tokenizer, encode("<think>\n\n</think>\n\n"), marks)
