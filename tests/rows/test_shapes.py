"""Rows of every accepted shape mean the same conversation; what nobody can know is refused with the place."""

import json

import pytest

from mlx_adapters.config.data import DataConfig
from mlx_adapters.errors import ConfigError, FormatError
from mlx_adapters.rows.row import RawRow

ASK, ANSWER = "Name a color.", "Blue."
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]


def row(values, **columns):
    return RawRow(values, "a.jsonl, line 3", DataConfig(**{f"{kind}_column": name for kind, name in columns.items()}))


SAME = {
    "messages": {"messages": CHAT},
    "messages as JSON text": {"messages": json.dumps(CHAT)},
    "content parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    "ShareGPT": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
    "conversations of roles": {"conversations": CHAT},
    "prompt, completion": {"prompt": ASK, "completion": ANSWER},
    "lists of messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "a list and a text": {"prompt": CHAT[:1], "completion": ANSWER},
    "Alpaca": {"instruction": ASK, "input": "", "output": ANSWER},
    "Alpaca and its text": {"instruction": ASK, "input": "", "output": ANSWER, "text": "### Instruction: ..."},
    "question, answer": {"question": ASK, "answer": ANSWER, "id": 3},
    "ShareGPT with contents": {"conversations": [{"from": "Human", "content": ASK}, {"from": "GPT", "text": ANSWER}]},
    "other speakers": {"messages": [{"role": "human", "content": ASK}, {"role": "Model", "content": ANSWER}]},
    "roles and values": {"messages": [{"role": "user", "value": ASK}, {"role": "ai", "text": ANSWER, "content": None}]},
    "JSON text, JSON text": {"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])},
    "messages in columns": {"messages": {"role": ["user", "assistant"], "content": [ASK, ANSWER]}},
    "ShareGPT in columns": {"conversations": {"from": ["human", "gpt"], "value": [ASK, ANSWER]}},
    "a refusal": {"messages": [CHAT[0], {"role": "assistant", "content": None, "refusal": ANSWER}]},
    "nulls around it": {"messages": CHAT, "prompt": None, "completion": None, "tools": None, "weight": None},
    "JSON text of a part": {"messages": [{"role": "user", "content": {"type": "text", "text": ASK}}, CHAT[1]]},
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
def test_every_shape_means_the_same_conversation(values):
    assert row(values).messages == CHAT
    assert row(values).format in ("chat", "completion") and row(values).tools is None


def test_a_prompt_of_messages_is_context_and_its_completion_is_trained():
    raw = row({"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]})
    assert raw.weights == (0, 0, 0, 1) and [m["role"] for m in raw.messages] == ["user", "assistant"] * 2


def test_alpaca_takes_its_input_and_a_system_prompt():
    raw = row({"instruction": "Add.", "input": "2, 3", "output": "5"})
    assert (raw.format, raw.prompt, raw.completion) == ("completion", "Add.\n\n2, 3", "5")
    assert row({"instruction": "", "input": "2 + 3?", "output": "5"}).prompt == "2 + 3?"
    told = row({"system": "Be brief.", "instruction": "Add.", "input": "", "output": "5"})
    assert told.format == "chat" and told.messages[0] == {"role": "system", "content": "Be brief."}
    assert told.weights == (0, 1, 1)


def test_what_belongs_to_a_question_goes_with_it():
    raw = row({"question": "How many?", "context": "CREATE TABLE t", "answer": "SELECT"})
    assert (raw.prompt, raw.completion) == ("How many?\n\nCREATE TABLE t", "SELECT")
    assert raw.canonical.used == ("question", "answer", "context")
    assert row({"question": ASK, "context": {"title": []}, "answer": ANSWER}).prompt == ASK
    earlier = [["One?", "1"], ["Two?", "2"]]
    for history in (earlier, json.dumps(earlier)):
        raw = row({"instruction": "Three?", "input": "", "output": "3", "history": history, "system": "Count."})
        assert [m["content"] for m in raw.messages] == ["Count.", "One?", "1", "Two?", "2", "Three?", "3"]
        assert raw.format == "chat" and raw.weights == (0, 1, 1, 1, 1, 1, 1) and raw.silent == frozenset()
        assert "history" in raw.canonical.used
    for other in ([], "long", [["a"]], [{"role": "user", "content": "a"}]):
        assert row({"prompt": ASK, "completion": ANSWER, "history": other}).messages == CHAT
    parts = row({"messages": CHAT, "system": [{"text": "Be "}, {"type": "text", "text": "brief."}]})
    assert parts.messages == [{"role": "system", "content": "Be brief."}, *CHAT]


def test_a_question_tools_and_calls():
    calls = [{"name": "look", "arguments": {"city": "Oslo"}}, {"name": "look", "arguments": {"city": "Rome"}}]
    tools = [{"name": "look", "parameters": {"city": {"type": "str"}}}]
    raw = row({"query": ASK, "answers": json.dumps(calls), "tools": json.dumps(tools)})
    assert raw.messages[0] == CHAT[0] and raw.tools == [{"type": "function", "function": tools[0]}]
    assert raw.messages[1]["content"] is None
    assert [call["function"] for call in raw.messages[1]["tool_calls"]] == calls


def test_named_columns_decide_alone():
    values = {"q": ASK, "a": ANSWER, "prompt": "p", "completion": "c", "body": "whole", "talk": CHAT}
    assert row(values, prompt="q", completion="a").messages == CHAT
    assert row(values, messages="talk").messages == CHAT
    assert row(values, text="body").text == "whole"
    with pytest.raises(FormatError, match="line 3: the row has no column 'reply'") as error:
        _ = row(values, prompt="q", completion="reply").format
    assert "'q', 'a'" in error.value.hint


@pytest.mark.parametrize(
    "names",
    [
        {"prompt": "q"},
        {"completion": "a"},
        {"text": "t", "messages": "m"},
        {"text": "t", "prompt": "q", "completion": "a"},
    ],
)
def test_names_of_columns_that_contradict_each_other_are_refused(names):
    with pytest.raises(ConfigError):
        row({}, **names)


WEATHER = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLS = {
    "OpenAI": {
        "tool_calls": [{"id": "1", "type": "function", "function": {**WEATHER, "arguments": '{"city": "Oslo"}'}}]
    },
    "objects": {"tool_calls": [{"id": "1", "function": WEATHER}]},
    "names alone": {"tool_calls": [{"id": "1", **WEATHER}]},
    "as JSON text": {"tool_calls": json.dumps([{"id": "1", "function": WEATHER}])},
    "calls as JSON text": {"tool_calls": [json.dumps({"id": "1", "function": WEATHER})]},
    "nulls of Parquet": {
        "tool_calls": [{"id": "1", "function": {**WEATHER, "arguments": {"city": "Oslo", "a": None}}}]
    },
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tool_calls_come_as_objects(call):
    raw = row({"messages": [CHAT[0], {"role": "assistant", "content": None, **call}]}).messages[1]
    assert raw == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "id": "1", "function": WEATHER}],
    }


def test_older_and_sharegpt_calls_are_calls_too():
    older = row({"messages": [CHAT[0], {"role": "assistant", "content": None, "function_call": WEATHER}]})
    shared = row(
        {"conversations": [{"from": "human", "value": ASK}, {"from": "function_call", "value": json.dumps(WEATHER)}]}
    )
    assert older.messages == shared.messages and shared.messages[1]["tool_calls"][0]["function"] == WEATHER
    told = row({"conversations": [{"from": "observation", "value": "7"}]})
    assert told.messages == [{"role": "tool", "content": "7"}]


def test_a_null_that_is_meant_is_kept_in_arguments_as_text():
    call = {"name": "set", "arguments": '{"to": null, "list": [null]}'}
    raw = row({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}).messages[1]
    assert raw["tool_calls"][0]["function"]["arguments"] == {"to": None, "list": [None]}


NESTED = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
FLAT = {"type": "function", "name": "weather", "parameters": '{"type": "object"}'}  # as in OpenAI's Responses
BARE = {"name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize("tool", [NESTED, FLAT, BARE])
@pytest.mark.parametrize("form", [lambda t: [t], lambda t: json.dumps([t]), lambda t: [json.dumps(t)], dict])
def test_tools_are_told_as_a_server_tells_of_them(tool, form):
    tools = form(tool)
    assert row({"messages": CHAT, "tools": tools}).tools == [NESTED]
    assert row({"prompt": ASK, "completion": ANSWER, "tools": tools}).format == "chat"


def test_weights_are_of_turns_and_do_not_reach_the_template():
    raw = row({"messages": [{**CHAT[0]}, {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": True}]})
    assert raw.weights == (1, 0, 1, 1) and raw.messages == [*CHAT, *CHAT]
    assert row({"messages": [CHAT[0], {**CHAT[1], "loss": False}]}).weights == (1, 0)
    other = row({"messages": [CHAT[0], {**CHAT[1], "train": False}, CHAT[0], {**CHAT[1], "training": True}]})
    assert other.weights == (1, 0, 1, 1) and other.messages == [*CHAT, *CHAT]
    assert row({"messages": [CHAT[0], {**CHAT[1], "weight": 1, "training": False}]}).weights == (1, 0)


def test_a_tool_that_is_no_function_is_as_it_is():
    assert row({"messages": CHAT, "tools": [{"type": "web_search"}]}).tools == [{"type": "web_search"}]


def test_empty_turns_are_turns():
    empty = [CHAT[0], {"role": "assistant", "content": None}, {"role": "assistant", "content": []}]
    assert [m["content"] for m in row({"messages": empty}).messages] == [ASK, "", ""]
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "7"}]}
    assert row({"messages": [CHAT[0], thought]}).messages[1] == {
        "role": "assistant",
        "content": "7",
        "reasoning_content": "hm",
    }


def test_a_result_that_is_an_object_is_told_as_json():
    told = [({"type": "error"}, '{"type": "error"}'), ([{"t": "ü"}, {}], '[{"t": "ü"}, {}]'), ([7], "[7]")]
    for value, text in [*told, ([{"type": "text", "text": "7"}], "7"), (["7", "8"], "78")]:
        messages = [*CHAT, {"role": "tool", "content": value}]
        assert row({"messages": messages}).messages[-1] == {"role": "tool", "content": text}


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
def test_what_a_call_gives_its_function_has_several_names(name):
    given = {"city": "Oslo"}
    for call in ({"name": "look", name: given}, {"function": {"name": "look", name: json.dumps(given)}}):
        (read,) = row({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}]}).messages[1]["tool_calls"]
        assert read == {"type": "function", "function": {"name": "look", "arguments": given}}


def test_a_role_that_templates_write_by_its_name_stays():
    said = [CHAT[0], {"role": "observation", "content": "7"}, {"role": "narrator", "content": "8"}]
    assert [m["role"] for m in row({"messages": said}).messages] == ["user", "observation", "narrator"]
    assert row({"conversations": [{"from": "observation", "value": "7"}]}).messages[0]["role"] == "tool"


def test_an_older_call_beside_others_is_one_more_or_the_same():
    look, other = ({"name": name, "arguments": "{}"} for name in ("look", "other"))
    for older, names in ((look, ["look"]), (other, ["look", "other"]), (None, ["look"]), ({}, ["look"])):
        said = {"role": "assistant", "tool_calls": [{"id": "1", "function": look}], "function_call": older}
        calls = row({"messages": [CHAT[0], said]}).messages[1]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == names


def test_calls_and_results_of_speakers():
    look = json.dumps({"name": "look", "arguments": {}})
    said = [CHAT[0], {"role": "tool_call", "content": look}, {"role": "tool_response", "content": "7"}, CHAT[1]]
    messages = row({"messages": said}).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] is None and messages[1]["tool_calls"][0]["function"]["name"] == "look"


def test_no_thought_is_lost_beside_another():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "7"}]
    for told, fields in (("", {"reasoning_content": "hm"}), ("so", {"reasoning_content": "so", "thinking": "hm"})):
        message = row({"messages": [{"role": "assistant", "reasoning_content": told, "content": parts}]}).messages[0]
        assert message == {"role": "assistant", "content": "7", **fields}


PRINTED = str(CHAT)  # as Python prints it, and a frame's to_csv writes it
BAD = {
    "messages as Python prints them": ({"messages": PRINTED}, "'messages' holds messages as Python prints them"),
    "a prompt as Python prints it": ({"prompt": PRINTED, "completion": "y"}, "'prompt' holds messages as Python"),
    "no words at all": ({"conversations": [{"from": "human"}]}, "message 1 of 'conversations' has no 'content'"),
    "an argument of ours": (
        {"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": True}},
        "the chat template's 'add_generation_prompt' cannot be given by 'chat_template_kwargs'",
    ),
    "a turn that counts in part": (
        {"messages": [CHAT[0], {**CHAT[1], "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]},
        "message 2 has 'train_detail', and a turn is trained whole or not at all",
    ),
    "columns of other lengths": ({"messages": {"role": ["user"], "content": []}}, "'messages' must be a list"),
    "a role that is a number": ({"messages": [{"role": 1, "content": "x"}]}, "message 1 has no 'role'"),
    "a request without messages": (
        {"input": {"tools": []}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]},
        "'input' must be an object with 'messages'",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "message 1 holds a part of type 'image_url'",
    ),
    "half a weight": ({"messages": [{**CHAT[1], "weight": 0.5}]}, "weight of message 1 must be 0 or 1, not '0.5'"),
    "a speaker that is a list": ({"conversations": [{"from": [], "value": ""}]}, "who is unknown"),
    "an unknown speaker": ({"conversations": [{"from": "moon", "value": ""}]}, "'moon', who is unknown"),
    "a call of nothing": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
        "a tool call of message 1 has no 'name'",
    ),
    "calls that are a number": ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "'tool_calls' of message 1"),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a: 1"}]}]},
        "the arguments of a tool call of message 1 are no JSON: '{a: 1'",
    ),
    "bytes": ({"prompt": b"x", "completion": "y"}, "'prompt' must be text or a list of messages, not bytes"),
    "text as messages": ({"messages": "hello"}, "'messages' must be a list"),
    "a message as text": ({"messages": ["hello"]}, "message 1 must be an object"),
    "tools that are none": ({"messages": CHAT, "tools": "call me"}, "'tools' must be a list of tools"),
    "two ends": ({"messages": CHAT, "prompt": ASK, "completion": "Red."}, "which end differently"),
    "two answers": ({"question": ASK, "answer": "Blue.", "response": "Red."}, "which is the prompt"),
    "nothing known": ({"body": "x"}, "the row has 'body'"),
    "nothing": ({}, "the row has no key"),
    "half a pair": ({"prompt": "a", "chosen": "b"}, "the row has 'prompt', 'chosen', which is half a pair"),
    "a null": ({"prompt": ASK, "chosen": None, "rejected": "c"}, "and null as 'chosen', which is half a pair"),
    "a message of another list": ({"conversations": [3]}, "message 1 of 'conversations' must be an object"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_what_nobody_can_know_is_refused_with_its_place(values, message):
    with pytest.raises(FormatError, match=r"a\.jsonl, line 3: ") as error:
        _ = row(values).format
    assert message in str(error.value)


def test_a_preference_means_its_chosen_answer():
    raw = row({"prompt": ASK, "chosen": "Blue.", "rejected": "Fish."})
    assert raw.format == "completion" and raw.canonical.used == ("prompt", "chosen", "rejected")
    assert (raw.prompt, raw.completion, raw.rejected.completion) == (ASK, "Blue.", "Fish.")


def test_what_a_row_gives_its_template_wins_over_the_default():
    values = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    raw = RawRow(values, "here", DataConfig(chat_template_args={"enable_thinking": True, "style": "brief"}))
    assert raw.template_arguments == {"enable_thinking": False, "style": "brief"}


def called(*ids):
    calls = [{"type": "function", "id": id, "function": {"name": f"f{id}", "arguments": {}}} for id in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(id):
    return {"role": "tool", "content": f"of {id}", "tool_call_id": id}


def test_results_stand_in_the_order_of_their_calls():
    """Most templates write no ids: to the model the first result is the first call's."""
    talk = [CHAT[0], called("a", "b", "c"), result("c"), result("a"), result("b"), CHAT[1], called("d"), result("d")]
    wanted = [*talk[:2], result("a"), result("b"), result("c"), *talk[5:]]
    talk[3], wanted[2] = talk[3] | {"weight": 0}, result("a")
    raw = row({"messages": talk})
    assert raw.messages == wanted and raw.weights == (1, 1, 0, 1, 1, 1, 1, 1)
    some = [CHAT[0], called("a", "b", "c"), result("c"), result("b"), CHAT[1]]
    assert row({"messages": some}).messages == [*some[:2], result("b"), result("c"), CHAT[1]]
    twice = [CHAT[0], called("a", "a", "b"), result("b"), result("a"), CHAT[1]]
    assert [message["content"] for message in row({"messages": twice}).messages[2:4]] == ["of a", "of b"]
    nameless = [{key: value for key, value in call.items() if key != "id"} for call in called("a", "b")["tool_calls"]]
    by_name = [{"role": "tool", "content": f"of {id}", "name": f"f{id}"} for id in "ba"]
    asked = [CHAT[0], called() | {"tool_calls": nameless}, *by_name, CHAT[1]]
    assert row({"messages": asked}).messages[2:4] == by_name[::-1]
    for names in (("fa", "fa"), ("fa", {"a": 1}), ("fa", None)):
        asked[2:4] = [one | {"name": name} for one, name in zip(by_name, names, strict=True)]
        assert [one["content"] for one in row({"messages": asked}).messages[2:4]] == ["of b", "of a"]
    for strange in (["b", "x"], ["b", "b"], ["b", None]):  # nobody knows whose these are
        asked = [CHAT[0], called("a", "b"), *map(result, strange), CHAT[1]]
        assert [message["content"] for message in row({"messages": asked}).messages[2:4]] == [
            f"of {id}" for id in strange
        ]


@pytest.mark.parametrize("message", [called({"n": 1}), result(["a"])])
def test_an_id_is_text(message):
    with pytest.raises(FormatError, match=r"a\.jsonl, line 3: the id of a tool call of message 2 must be text\."):
        _ = row({"messages": [CHAT[0], message, CHAT[1]]}).messages
