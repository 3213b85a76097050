"""Tools, reasoning and structured output, asked for by OpenAI's own client.

The model's weights are random: that it calls and writes JSON is the grammar's doing, row by row in a mixed batch.
"""

import json
import threading

import openai
import pytest
from helpers.chat_families import TOOLS, chat_tokenizer, write_base
from helpers.schemas import FORMAT, PERSON
from helpers.serving import running

CHAT = [{"role": "user", "content": "Who?"}]
LOOK = {"type": "function", "function": {"name": "look", "parameters": PERSON}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("tools") / "qwen3", "qwen3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(tmp_path_factory.mktemp("home")))
        with running(folder, [], max_batch=8) as (address, engine):
            yield address, engine


@pytest.fixture
def ask(server):
    client = openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}

    def asked(messages=CHAT, **options):
        options = {"model": "base", "messages": messages, "max_tokens": 300, "seed": 1, "extra_body": quiet} | options
        return client.chat.completions.create(**options)

    return asked


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_comes(ask, choice, seed):
    message = ask(tools=[*TOOLS, LOOK], tool_choice=choice, parallel_tool_calls=False, seed=seed).choices[0]
    (call,) = message.message.tool_calls
    assert message.finish_reason == "tool_calls" and message.message.content is None
    if choice != "required":
        assert call.function.name == "look" and set(json.loads(call.function.arguments)) == {"name", "old"}


def allowing(*names, mode="required"):
    """The choice of some tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_tools_that_are_allowed_are_called(ask):
    others = [LOOK | {"function": LOOK["function"] | {"name": name}} for name in ("hear", "smell")]
    for seed in range(6):
        options = dict(tools=[*TOOLS, LOOK, *others], parallel_tool_calls=False, seed=seed)
        (call,) = ask(**options, tool_choice=allowing("hear", "look")).choices[0].message.tool_calls
        assert call.function.name in ("hear", "look")
    free = dict(tools=[LOOK, *others], max_tokens=8, temperature=0)  # then they alone are what the model is told of
    assert said(ask(**free, tool_choice=allowing("hear", mode="auto"))) == said(ask(**free | {"tools": others[:1]}))


def test_a_stream_of_calls_is_the_whole_answer(ask):
    options = dict(tools=[LOOK], tool_choice="required", parallel_tool_calls=True, max_tokens=120)
    whole = ask(**options).choices[0]
    calls = {}
    for chunk in ask(**options, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            one = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
            one["arguments"] += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    wanted = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
    assert [(c["name"], c["arguments"]) for c in calls.values()] == wanted and reason == whole.finish_reason
    assert all(one["id"] for one in calls.values())


def test_json_of_a_schema_and_any_json(ask):
    for seed in range(3):
        answer = ask(response_format=FORMAT, seed=seed).choices[0]
        assert answer.finish_reason == "stop"
        assert set(json.loads(answer.message.content)) == {"name", "old"}
    text = "".join(c.choices[0].delta.content or "" for c in ask(response_format=FORMAT, stream=True))
    assert set(json.loads(text)) == {"name", "old"}
    loose = ask(response_format={"type": "json_object"}, max_tokens=8, logit_bias=biased("}")).choices[0]
    assert json.loads(loose.message.content) == {}


def biased(text):
    return {str(chat_tokenizer("qwen3").encode(text, add_special_tokens=False)[0]): 100}


def test_calls_or_json_where_both_are_allowed(ask):
    kinds = set()
    for seed in range(12):
        answer = ask(
            tools=[LOOK], response_format=FORMAT, seed=seed, parallel_tool_calls=False, temperature=1.5
        ).choices[0]
        calls = answer.message.tool_calls
        kinds.add(bool(calls))
        text = calls[0].function.arguments if calls else answer.message.content
        assert set(json.loads(text)) == {"name", "old"}
    assert False in kinds


def test_reasoning_is_told_and_streamed_apart_and_a_grammar_waits_for_its_end(tmp_path):
    """The template opens the reasoning; these weights never close it, unless they are helped."""
    close = {str(chat_tokenizer("qwen3_thinking").encode("</think>", add_special_tokens=False)[0]): 100}
    with running(write_base(tmp_path / "base", "qwen3_thinking"), []) as (address, _):
        client = openai.OpenAI(base_url=address + "/v1", api_key="unused", max_retries=0)
        ask = lambda **more: client.chat.completions.create(  # noqa: E731
            **{"model": "base", "messages": CHAT, "temperature": 0, "max_tokens": 60} | more
        )
        told = ask()
        assert told.usage.completion_tokens_details.reasoning_tokens == told.usage.completion_tokens == 60
        whole = told.choices[0].message
        assert whole.content == "" and len(whole.reasoning_content) > 10 and whole.reasoning == whole.reasoning_content
        deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == whole.reasoning_content
        assert not any(delta.content for delta in deltas)
        assert ask(response_format=FORMAT).choices[0].message.content == ""
        answer = ask(response_format=FORMAT, logit_bias=close, max_tokens=300)
        assert 1 <= answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
        closed = answer.choices[0].message
        assert set(json.loads(closed.content)) == {"name", "old"}
        ends = {str(token): 9 for token in chat_tokenizer("qwen3_thinking").eos_token_ids} | {next(iter(close)): 4}
        assert ask(logit_bias=ends, temperature=1, seed=1).choices[0].finish_reason == "stop"
        for seed in range(3):  # what must come is not left out because the model ends while it thinks
            early = dict(logit_bias=ends, temperature=1, max_tokens=400, seed=seed)
            assert set(json.loads(ask(response_format=FORMAT, **early).choices[0].message.content)) == {"name", "old"}
            (call,) = (
                ask(tools=[LOOK], tool_choice="required", parallel_tool_calls=False, **early)
                .choices[0]
                .message.tool_calls
            )
            assert set(json.loads(call.function.arguments)) == {"name", "old"}
        called = ask(tools=[LOOK], tool_choice="required", logit_bias=close, max_tokens=300, parallel_tool_calls=False)
        assert called.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_and_results(ask):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"name": "a", "old": true}'}}
    talk = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [{"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "seen"}]}]
    assert ask(talk, tools=[LOOK], max_tokens=5).usage.completion_tokens <= 5
    assert ask(talk, tools=[LOOK], tool_choice="none", max_tokens=5).choices[0].message.tool_calls is None
    call["function"]["arguments"] = "[1]"
    with pytest.raises(openai.BadRequestError, match="arguments"):
        ask(talk, tools=[LOOK])


def test_results_reach_the_model_in_the_order_of_their_calls(ask):
    """Clients that call tools at once send the results as they come; the template writes no ids."""
    calls = [{"id": id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for id in "ab"]
    results = [{"role": "tool", "tool_call_id": id, "content": text} for id, text in (("a", "one"), ("b", "two 2 2"))]
    talk = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls}]
    answers = [ask([*talk, *told], tools=[LOOK], max_tokens=8, logprobs=True) for told in (results, results[::-1])]
    usage = [answer.usage.prompt_tokens_details.cached_tokens - answer.usage.prompt_tokens for answer in answers]
    assert usage[1] == -1 and answers[0].choices[0].message == answers[1].choices[0].message  # all of it was known


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "tool", "tool_call_id": {"a": 1}, "content": "x"}, r"messages\[1\].* must be text"),
        ({"role": "user", "content": {"a": 1}}, r"'messages\[1\]\.content' must be a string"),
        ({"role": "user", "content": 5}, r"'messages\[1\]\.content' must be a string"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"'messages\[1\]\.content' must be a string"),
    ],
)
def test_a_message_that_is_none_is_refused_in_the_words_of_the_api(ask, message, why):
    with pytest.raises(openai.BadRequestError, match=why) as refused:
        ask([*CHAT, message])
    assert "trained" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "other"),
        ({"tools": [LOOK], "tool_choice": allowing("look", "other")}, "other"),
        ({"tools": [LOOK], "tool_choice": allowing("look", mode="none")}, "'auto' or 'required'"),
        ({"tools": [LOOK], "tool_choice": allowing()}, "tools"),
        ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "allowed_tools": "look"}}, "allows tools"),
        ({"tools": [LOOK], "tool_choice": "always"}, "allowed_tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [LOOK, LOOK]}, "twice"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "Once", "prefix": True}]}, "prefix"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_is_a_400_with_the_place(ask, options, place):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**options)
    assert place in str(caught.value)


def test_grammars_change_no_other_row(server, ask):
    """Plain, drawn, penalized and constrained requests at once: each is what it is alone."""
    kinds = [
        {"temperature": 0, "max_tokens": 20},
        {"temperature": 1, "seed": 5, "max_tokens": 20, "top_p": 0.9},
        {"response_format": FORMAT, "seed": 3},
        {"tools": [LOOK], "tool_choice": "required", "seed": 4, "parallel_tool_calls": False},
        {"temperature": 0, "max_tokens": 20, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 0.8, "seed": 9, "max_tokens": 20, "extra_body": {"repetition_penalty": 1.3, "top_k": 20}},
    ]
    alone = [said(ask(**kind)) for kind in kinds]
    wrong = []

    def once(i):
        if said(ask(**kinds[i % len(kinds)])) != alone[i % len(kinds)]:
            wrong.append(i)

    threads = [threading.Thread(target=once, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def said(answer):
    message = answer.choices[0].message
    return message.content, [(c.function.name, c.function.arguments) for c in message.tool_calls or []]


def test_arguments_are_an_object_and_a_schema_of_anything_else_is_refused(ask):
    def tool(parameters):
        return [{"type": "function", "function": {"name": "look", "parameters": parameters}}]

    for kind in ("string", "objec", ["string", "null"]):
        with pytest.raises(openai.BadRequestError, match="must be the schema of an object") as refused:
            ask(tools=tool({"type": kind}))
        assert refused.value.param == "tools[0]"
    for odd in ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, {"enum": [1]}):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(tools=tool(odd), tool_choice="required")
        assert refused.value.param == "tools[0].function.parameters" and "grammar" not in str(refused.value)
    either = {"type": ["object", "string", "null"], "maxProperties": 0}
    for seed in range(4):
        message = (
            ask(tools=tool(either), tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0].message
        )
        assert [call.function.arguments for call in message.tool_calls] == ["{}"]


def test_older_functions_are_called_in_the_older_words_whole_and_streamed(ask):
    """In them an answer has one call."""
    old = dict(functions=[LOOK["function"]], function_call={"name": "look"}, seed=2)
    whole = ask(**old).choices[0]
    assert whole.finish_reason == "function_call" and whole.message.content is None
    assert whole.message.tool_calls is None
    assert set(json.loads(whole.message.function_call.arguments)) == {"name", "old"}
    choices = [chunk.choices[0] for chunk in ask(**old, stream=True)]
    assert choices[-1].finish_reason == "function_call" and all(each.delta.tool_calls is None for each in choices)
    told = [each.delta.function_call for each in choices if each.delta.function_call]
    assert [call.name for call in told] == ["look"] + [None] * (len(told) - 1)
    assert "".join(call.arguments for call in told) == whole.message.function_call.arguments
    talk = [*CHAT, whole.message.model_dump(exclude_none=True), {"role": "function", "name": "look", "content": "7"}]
    assert ask([*talk], functions=old["functions"], max_tokens=4).choices[0].finish_reason in ("length", "stop")
    both = ask(**old | {"function_call": None}, tools=[LOOK], tool_choice="required", parallel_tool_calls=False)
    assert len(both.choices[0].message.tool_calls) == 1 and both.choices[0].finish_reason == "tool_calls"


def test_the_older_choice_of_a_function_is_the_choice_of_a_tool(ask):
    old = dict(
        functions=[LOOK["function"], LOOK["function"] | {"name": "hear"}], max_tokens=200, parallel_tool_calls=False
    )
    assert ask(**old, function_call={"name": "hear"}).choices[0].message.function_call.name == "hear"
    free = dict(max_tokens=4, temperature=0)
    plain = ask(**free).usage.prompt_tokens
    assert ask(**old | free, function_call="none").usage.prompt_tokens == plain  # the model is told of none
    assert ask(**old | free, function_call="auto").usage.prompt_tokens > plain
    with pytest.raises(openai.BadRequestError, match="'nothing'"):
        ask(**old, function_call={"name": "nothing"})
