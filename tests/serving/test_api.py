"""Responses, embeddings, what models are told of, vLLM's and Ollama's paths."""

import base64
import json

import httpx
import numpy as np
import openai
import pytest
from helpers.adapters import random_adapter
from helpers.chat_families import write_base
from helpers.schemas import PERSON
from helpers.serving import running

from mlx_adapters.generation.live import load_model
from mlx_adapters.protocols.responses import ResponseWriter
from mlx_adapters.sources.registry import register

TOOL = {"type": "function", "name": "look", "parameters": PERSON, "strict": True}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def module_home(tmp_path_factory):
    return tmp_path_factory.mktemp("api-home")


@pytest.fixture(autouse=True)
def home(module_home, monkeypatch):
    """One home for all tests here: the server lives longer than a test."""
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(module_home))


@pytest.fixture(scope="module")
def server(tmp_path_factory, module_home):
    folder = write_base(tmp_path_factory.mktemp("api") / "qwen3", "qwen3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(module_home))
        model = load_model(folder)
        for i, name in enumerate("ab"):
            register(random_adapter(model, seed=i + 1), name)
        with running(folder, [("a", "a")], allow_load=True) as (address, engine):
            yield address, engine, model


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)


def respond(client, given="Who?", **options):
    return client.responses.create(
        **{"model": "base", "input": given, "temperature": 0, "max_output_tokens": 200, "extra_body": QUIET} | options
    )


def test_a_response_is_the_chat(client):
    plain = respond(client, instructions="Be brief.", max_output_tokens=8)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    chat = client.chat.completions.create(
        model="base", messages=messages, temperature=0, max_tokens=8, extra_body=QUIET
    )
    assert plain.output_text == chat.choices[0].message.content
    assert plain.usage.input_tokens == chat.usage.prompt_tokens and plain.usage.output_tokens == 8
    assert plain.status == "incomplete" and plain.incomplete_details.reason == "max_output_tokens"
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    assert respond(client, items, instructions="Be brief.", max_output_tokens=8).output_text == plain.output_text


def test_tools_and_formats_of_responses(client):
    answer = respond(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "look"
    assert set(json.loads(call.arguments)) == {"name", "old"} and answer.status == "completed"
    talk = [{"role": "user", "content": "Who?"}, call.model_dump()]
    talk += [{"type": "function_call_output", "call_id": call.call_id, "output": "seen"}]
    assert respond(client, talk, tools=[TOOL], max_output_tokens=4).usage.output_tokens <= 4
    format = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    assert set(json.loads(respond(client, text={"format": format}).output_text)) == {"name", "old"}
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        respond(client, previous_response_id="resp_1")


def test_a_response_tells_what_was_asked_for(client):
    asked = {
        "instructions": "Be brief.",
        "metadata": {"tenant": "a"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "none"},
        "text": {"format": {"type": "json_object"}},
        "tool_choice": "none",
        "tools": [TOOL],
        "user": "ada",
    }
    defaults = {
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
    }
    for given, wanted in ((asked, asked), ({}, defaults), (dict.fromkeys(defaults), defaults)):
        events = list(respond(client, max_output_tokens=1, stream=True, **given))
        told = respond(client, max_output_tokens=1, **given)
        for response in (told, events[0].response, events[-1].response):
            record = response.to_dict()
            assert {name: record[name] for name in wanted} == wanted
            assert record["max_output_tokens"] == 1 and record["temperature"] == 0 and not record["store"]


def test_a_refusal_names_the_field_that_holds_the_text(server):
    long = "word " * 9000
    talk = [{"role": "user", "content": long}]
    for path, field, text in (
        ("/v1/responses", "input", long),
        ("/v1/responses", "input", talk),
        ("/v1/chat/completions", "messages", talk),
        ("/v1/completions", "prompt", long),
        ("/api/generate", "prompt", long),
        ("/api/chat", "messages", talk),
    ):
        answer = httpx.post(server[0] + path, json={"model": "a", field: text})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field, path


def test_a_streamed_response(client):
    whole = respond(client, max_output_tokens=12)
    events = list(respond(client, max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1
    with client.responses.stream(
        model="base", input="Who?", tools=[TOOL], tool_choice="required", parallel_tool_calls=False, extra_body=QUIET
    ) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert done[0].arguments == final.output[0].arguments and final.status == "completed"


def test_embeddings_are_the_mean_of_the_last_hidden_state(client, server):
    model, texts = server[2], ["Who are you?", "Nobody."]
    ids = [list(model.tokenizer.encode(text)) for text in texts]
    for name in ("base", "a"):
        with model.using(None if name == "base" else name):
            wanted = [np.array(model.module.model(model.checked_ids(one)[None])[0].mean(axis=0)) for one in ids]
        answer = client.embeddings.create(model=name, input=texts)
        assert np.allclose([one.embedding for one in answer.data], wanted, atol=1e-5)
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    raw = httpx.post(
        server[0] + "/v1/embeddings", json={"model": "a", "input": ids, "encoding_format": "base64"}
    ).json()
    packed = np.frombuffer(base64.b64decode(raw["data"][1]["embedding"]), "<f4")
    assert np.allclose(packed, wanted[1], atol=1e-5)
    for wrong in ("", [], None, [[]], 3):
        assert httpx.post(server[0] + "/v1/embeddings", json={"model": "a", "input": wrong}).status_code == 400


def test_models_tell_their_context_and_answers_what_made_them(client, server):
    told = {one.id: one for one in client.models.list()}
    assert told["base"].max_model_len == 4096 and told["a"].created > 1_700_000_000
    ask = lambda: client.chat.completions.create(  # noqa: E731
        model="a", messages=[{"role": "user", "content": "x"}], max_tokens=1
    )
    assert ask().system_fingerprint == ask().system_fingerprint != None  # noqa: E711


def test_vllms_paths_and_metrics(server):
    address = server[0]
    load = lambda **body: httpx.post(address + "/v1/load_lora_adapter", json=body)  # noqa: E731
    assert load(lora_name="b", lora_path="./b").status_code == 403
    assert load(lora_name="b").status_code == 400
    assert load(lora_name="b", lora_path="b").status_code == 200
    assert load(lora_name="b", lora_path="b").status_code == 409
    body = {"model": "b", "prompt": "x", "max_tokens": 2}
    assert httpx.post(address + "/v1/completions", json=body).status_code == 200
    assert httpx.post(address + "/v1/unload_lora_adapter", json={"lora_name": "b"}).status_code == 200
    assert httpx.post(address + "/v1/unload_lora_adapter", json={"lora_name": "b"}).status_code == 404
    text = httpx.get(address + "/metrics").text
    ours = next(x for x in text.splitlines() if x.startswith('mlx_adapters_completion_tokens_total{model="b"}'))
    assert f'vllm:generation_tokens_total{{model_name="b"}} {ours.split()[-1]}' in text
    assert "vllm:num_requests_running" in text and 'vllm:time_to_first_token_seconds_bucket{model_name="b"' in text


def test_ollamas_paths(server, client):
    address = server[0]
    talk = [{"role": "user", "content": "Who?"}]
    options = {"temperature": 0, "num_predict": 8, "num_ctx": 2048}
    wanted = (
        client.chat.completions.create(model="a", messages=talk, temperature=0, max_tokens=8, extra_body=QUIET)
        .choices[0]
        .message.content
    )
    body = {"model": "a:latest", "messages": talk, "options": options, "think": False}
    whole = httpx.post(address + "/api/chat", json=body | {"stream": False}).json()
    assert whole["message"]["content"] == wanted and whole["done"] and whole["eval_count"] == 8
    assert 0 < whole["prompt_eval_duration"] < whole["total_duration"] and whole["eval_duration"] > 0
    lines = [json.loads(line) for line in httpx.post(address + "/api/chat", json=body).text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == wanted
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    generated = {"model": "a", "prompt": "Who?", "options": options, "think": False, "stream": False}
    assert httpx.post(address + "/api/generate", json=generated).json()["response"] == wanted
    more = {"num_predict": 200}
    formed = generated | {"format": PERSON, "options": options | more}
    assert set(json.loads(httpx.post(address + "/api/generate", json=formed).json()["response"])) == {"name", "old"}
    assert httpx.post(address + "/api/chat", json=body | {"options": {"mirostat": 2}}).status_code == 400
    for path, empty in (("/api/generate", {}), ("/api/generate", {"prompt": ""}), ("/api/chat", {"messages": []})):
        load = httpx.post(address + path, json={"model": "a:latest", "keep_alive": "5m", **empty}).json()
        assert (load["model"], load["done"], load["done_reason"]) == ("a", True, "load")
        assert httpx.post(address + path, json={"model": "nobody", **empty}).status_code == 404
    assert [m["name"] for m in httpx.get(address + "/api/tags").json()["models"]][:2] == ["base", "a"]


def test_an_error_after_the_beginning_of_a_response_is_an_event():
    writer = ResponseWriter.__new__(ResponseWriter)
    writer._number = 4
    error = {"message": "The engine stopped.", "type": "server_error", "param": None, "code": None}
    name, data = writer.frame({"error": error}).decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == error | {"type": "error", "sequence_number": 4}
