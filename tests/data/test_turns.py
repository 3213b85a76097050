"""What is trained of a conversation, in fifteen families of templates, against marks put in by hand."""

import random

import numpy as np
import pytest
from helpers.chat_families import FAMILIES, TOOLS, by_marks, chat_tokenizer, conversation, drawn, marked, plain
from mlx_lm.tuner.datasets import ChatDataset

from mlx_adapters.data import turns
from mlx_adapters.data.conversation import conversation as tokenized
from mlx_adapters.templates import tracing

ROWS = 12  # of each family; scripts/mask_fuzz goes through thousands


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str | None, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


def call(**arguments) -> dict:
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def shown(family: str, messages, template=None, tools=None, kind="bytes", **arguments) -> str:
    """The conversation with what is trained in [[ ]], from the first thing that is asked on."""
    tokenizer = chat_tokenizer(family, template, kind)
    row = tokenized(messages, tokenizer, "row", tools=tools, template_arguments=arguments)
    text = drawn(tokenizer, row.tokens, row.trained)
    return text[text.index(messages[0]["content"] or "[[") :]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversations_are_trained_as_the_marks_say(family):
    tokenizer, rng = chat_tokenizer(family), random.Random(f"suite {family}")
    for _ in range(ROWS):
        messages, tools = conversation(rng, FAMILIES[family])
        ids, trained = by_marks(tokenizer, family, messages, tools)
        row = tokenized(messages, tokenizer, "row", tools=tools)
        assert row.tokens.tolist() == ids
        assert drawn(tokenizer, ids, row.trained) == drawn(tokenizer, ids, trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_in_the_template_decide(family):
    """With the marks left in, what they hold is trained, and the tokens are the same."""
    tokenizer, with_marks, rng = chat_tokenizer(family), chat_tokenizer(family, marked(family)), random.Random(family)
    for _ in range(3):
        messages, tools = conversation(rng, FAMILIES[family])
        ids, trained = by_marks(tokenizer, family, messages, tools)
        row = tokenized(messages, with_marks, "row", tools=tools)
        assert row.tokens.tolist() == ids
        assert (row.trained <= trained).all()
        if family not in ("glm", "alpaca"):  # whose marks also stand in the next message, or hold nothing
            assert (row.trained == trained).all() and any(turn.spans for turn in row.turns)


def test_marks_may_leave_out_the_end():
    marks = "{% generation %}{{- message.content }}{% endgeneration %}{{-"
    template = plain("chatml").replace("{{- message.content }}{{-", marks)
    text = shown("chatml", [user("Q"), answer("b")], template)
    assert text == "Q<|im_end|>\n<|im_start|>assistant\n[[b]]<|im_end|>\n"


THOUGHT = "<think>\nI add.\n</think>\n\nIt is 4."


def test_a_thought_that_the_prompt_opened_is_closed_by_the_model():
    assert shown("qwen3_thinking", [user("sum?"), answer(THOUGHT)]) == (
        "sum?<|im_end|>\n<|im_start|>assistant\n<think>\n[[I add.\n</think>\n\nIt is 4.<|im_end|>]]\n"
    )
    assert shown("qwen3_thinking", [user("sum?"), answer("It is 4.")]) == (
        "sum?<|im_end|>\n<|im_start|>assistant\n<think>[[\n\n</think>\n\nIt is 4.<|im_end|>]]\n"
    )


def test_the_prompt_without_thinking_is_no_part_of_the_turn():
    plain_answer = [user("sum?"), answer("It is 4.")]
    head = "sum?<|im_end|>\n<|im_start|>assistant\n"
    assert shown("qwen3", plain_answer) == head + "[[<think>\n\n</think>\n\nIt is 4.<|im_end|>]]\n"
    closed = shown("qwen3", plain_answer, enable_thinking=False)
    assert closed == head + "<think>\n\n</think>\n\n[[It is 4.<|im_end|>]]\n"
    thought = shown("qwen3", [user("sum?"), answer(THOUGHT)], enable_thinking=False)
    assert thought == head + "[[<think>\nI add.\n</think>\n\nIt is 4.<|im_end|>]]\n"


def test_a_prompt_that_says_more_than_the_turn_counts_as_far_as_both_agree():
    assert shown("r1", [user("sum?"), answer("<b>4</b>")]) == "sum?<|Assistant|>[[<b>4</b><|eos|>]]"
    assert shown("gemma4", [user("sum?"), answer("<|channel>4")]) == (
        "sum?<turn|>\n<|turn>model\n[[<|channel>4<turn|>]]\n"
    )
    kept = plain("r1").replace("{%- if '</think>' in content %}", "{%- if false %}")
    assert shown("r1", [user("sum?"), answer(THOUGHT)], kept) == (
        "sum?<|Assistant|><think>\n[[I add.\n</think>\n\nIt is 4.<|eos|>]]"
    )


def test_calls_are_trained_whole():
    messages = [user("Paris?"), answer("Let me see.", tool_calls=[call(city="Paris"), call(n=2)])]
    assert shown("qwen3", messages, tools=TOOLS).endswith(
        '[[<think>\n\n</think>\n\nLet me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"n": 2}}\n</tool_call><|im_end|>]]\n'
    )


def test_what_a_tool_says_inside_the_turn_is_not_trained():
    """As in Gemma 4: one turn of the model's holds the call, the result and the answer."""
    messages = [user("Paris?"), answer(None, tool_calls=[call(city="Paris")]), {"role": "tool", "content": "sunny"}]
    assert shown("gemma4", [*messages, answer("It is sunny.")]) == (
        'Paris?<turn|>\n<|turn>model\n[[<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
        "<|tool_response>]]response:sunny<tool_response|>[[It is sunny.<turn|>]]\n"
    )
    one = (
        "{% for m in messages %}{{ '<|turn>' + m.role + '\n' + m.content }}{% for r in m.results or [] %}"
        "{{ '<|tool_call>f<tool_call|><|tool_response>' + messages[loop.index0].content + '<tool_response|>' + r }}"
        "{% endfor %}{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
    )
    assert shown("gemma4", [user("a"), answer("Look", results=["good."])], one) == (
        "a<turn|>\n<|turn>assistant\n[[Look<|tool_call>f<tool_call|><|tool_response>]]a<tool_response|>[[good.<turn|>]]\n"
    )


def test_a_result_before_the_first_word_of_a_turn_is_not_trained_either():
    template = (
        "{% for m in messages %}{{ '<|turn>' + m.role + '\n' }}{% if m.calls %}{{ '<|tool_call>f<tool_call|>"
        "<|tool_response>' + messages[0].content + '<tool_response|>' }}{% endif %}{{ m.content + '<turn|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
    )
    assert shown("gemma4", [user("Q"), answer("good.", calls=1)], template) == (
        "Q<turn|>\n<|turn>assistant\n[[<|tool_call>f<tool_call|><|tool_response>]]Q<tool_response|>[[good.<turn|>]]\n"
    )


def test_the_token_that_stops_may_begin_the_next_message():
    text = shown("glm", [user("a"), answer("b"), user("c"), answer("d")])
    assert text == "a<|assistant|>[[\nb<|user|>]]\nc<|assistant|>[[\nd<|user|>]]"


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (answer("b"), "[[\nb<|user|>]]"),
        (answer(""), "[[<|user|>]]"),
        (answer(None, tool_calls=[call()]), "[[\n<tool_call>get_weather\n</tool_call><|observation|>]]"),
    ],
)
def test_a_last_turn_ends_as_the_next_message_would_end_it(last, end):
    assert shown("glm", [user("a"), last]) == f"a<|assistant|>{end}"
    assert shown("glm", [user("a"), last, user("c")]).startswith(f"a<|assistant|>{end}".replace("observation", "user"))


def test_a_last_turn_gets_no_end_that_the_template_does_not_write_there():
    for family in FAMILIES.keys() - {"glm"}:
        tokenizer = chat_tokenizer(family)
        ids = tokenizer.apply_chat_template([user("a"), answer("b")], return_dict=False)
        assert tokenized([user("a"), answer("b")], tokenizer, "row").tokens.tolist() == ids
    assert shown("glm", [user("a"), answer("b")], plain("glm").replace("'<|user|>'", "'U'")) == "a<|assistant|>[[\nb]]"
    assert shown("glm", [user("a"), answer("b")], marked("glm")) == "a<|assistant|>[[\nb]]<|user|>"  # marks decide


def test_an_end_that_stands_between_messages_ends_the_last_too():
    between = (
        "{% for m in messages %}{{ '' if loop.first else '<|im_end|>' }}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|><|im_start|>assistant\n' }}{% endif %}"
    )
    assert shown("chatml", [user("Q"), answer("b")], between) == "Q<|im_end|><|im_start|>assistant\n[[b<|im_end|>]]"


@pytest.mark.parametrize("family", ["chatml", "llama3", "harmony", "glm", "alpaca"])
def test_a_turn_knows_whether_it_stops(family):
    row = tokenized([user("a"), answer("b"), user("c"), answer("d")], chat_tokenizer(family), "row")
    ends = {"harmony": [False, True], "alpaca": [False, False]}
    assert [turn.stops for turn in row.turns] == ends.get(family, [True, True])


def test_only_the_turns_asked_for_are_marked():
    messages = [user("a"), answer("b"), user("c"), answer("d")]
    tokenizer = chat_tokenizer("chatml")
    row = tokenized(messages, tokenizer, "row", turns=[3])
    assert tokenizer.decode(row.tokens[row.trained]) == "d<|im_end|>" and [t.message for t in row.turns] == [3]
    assert not tokenized(messages, tokenizer, "row", turns=[]).trained.any()


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma3", "mistral", "kimi", "apertus"])
def test_where_mlx_lm_masks_right_the_last_turn_begins_where_its_mask_does(family):
    """mlx-lm trains what follows the rest of the conversation, rendered with the generation prompt."""
    tokenizer = chat_tokenizer(family)
    messages = [user("One?"), answer("It is one."), user("Two?"), answer("It is two.")]
    tokens, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": messages})
    row = tokenized(messages, tokenizer, "row", turns=[3])
    assert row.tokens.tolist() == tokens
    ((start, stop),) = row.turns[0].spans
    assert start == offset and tokenizer.decode(tokens[stop:]).strip() == ""


@pytest.mark.parametrize("family", ["qwen3", "qwen3_thinking", "llama3", "r1", "glm", "harmony"])
def test_many_turns_take_few_renderings_and_are_found_alike(family, monkeypatch):
    """Each prompt is a rendering of all that comes before it: twice the turns would take four times as long."""
    tokenizer, rendered, render = chat_tokenizer(family), [], tracing.render
    called = [answer(None, tool_calls=[call(n=1)]), {"role": "tool", "content": "7", "tool_call_id": "1"}]
    several = [user("a"), *called, answer("b"), user("c <think>\n"), answer("<think>\nd"), user("e"), answer("")]
    monkeypatch.setattr(tracing, "render", lambda *args: rendered.append(1) or render(*args))
    row = tokenized(several * 6, tokenizer, "row")
    few = len(rendered)
    monkeypatch.setattr(turns, "ENOUGH", 99)
    assert np.array_equal(row.trained, tokenized(several * 6, tokenizer, "row").trained)
    assert few < 20 and len(rendered) - few > len(row.turns) == 24


def test_a_template_that_writes_the_last_message_alone_trains_that():
    last = (
        "{% for m in messages %}{% if loop.last %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer("chatml", last)
    row = tokenized([user("a"), answer("b"), user("c"), answer("d")], tokenizer, "row")
    assert drawn(tokenizer, row.tokens, row.trained) == "<|im_start|>assistant\n[[d<|im_end|>]]\n"
    assert [turn.reached for turn in row.turns] == [False, True]


def test_messages_that_no_loop_takes_up_are_found_by_their_characters():
    by_number = (
        "{% for i in range(messages | length) %}{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content "
        "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    copied = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        "{% set ns.all = ns.all + [{'who': m.role, 'text': m.content | trim}] %}{% endfor %}{% for m in ns.all %}"
        "{{ '<|im_start|>' + m.who + '\n' + m.text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    at_once = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' %}{% endfor %}"
        "{{ ns.text }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for template in (by_number, copied, at_once):
        assert shown("chatml", [user("Q"), answer("b"), user("c"), answer("d")], template) == (
            "Q<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n[[d<|im_end|>]]\n"
        )


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_tokenizers_of_every_kind_bring_characters_to_tokens(family, kind):
    tokenizer, rng = chat_tokenizer(family, kind=kind), random.Random(f"{family} {kind}")
    for _ in range(ROWS):
        messages, tools = conversation(rng, FAMILIES[family])
        ids, trained = by_marks(tokenizer, family, messages, tools)
        row = tokenized(messages, tokenizer, "row", tools=tools)
        assert row.tokens.tolist() == ids
        assert np.array_equal(row.trained, trained), (
            drawn(tokenizer, ids, row.trained),
            drawn(tokenizer, ids, trained),
        )
