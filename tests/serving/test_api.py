"""Responses, embeddings, what models are told of, vLLM's and Ollama's paths."""

import base64
import json
import re

import httpx
import numpy as np
import openai
import pytest
from helpers.adapters import random_adapter
from helpers.chat_families import chat_tokenizer, write_base
from helpers.schemas import PERSON
from helpers.serving import running

from mlx_adapters.generation.live import load_model
from mlx_adapters.protocols.ollama import OllamaWriter
from mlx_adapters.protocols.responses import ResponseWriter
from mlx_adapters.serving.jobs import Job
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
    other = TOOL | {"name": "hear"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    answer = respond(client, tools=[other, TOOL], tool_choice=allowed, parallel_tool_calls=False)
    assert [call.name for call in answer.output] == ["look"] and answer.to_dict()["tool_choice"] == allowed
    format = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    assert set(json.loads(respond(client, text={"format": format}).output_text)) == {"name", "old"}
    for place in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"}):
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            respond(client, **place)
    assert respond(client, max_output_tokens=1, max_tool_calls=2).usage.output_tokens == 1


def test_log_probabilities_of_a_response_are_the_chats(client):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 6}
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Who?"}], temperature=0, max_tokens=6, logprobs=True,
        top_logprobs=2, extra_body=QUIET,
    )  # fmt: skip
    wanted = [one.to_dict() for one in chat.choices[0].logprobs.content]
    assert len(wanted) == 6 and all(len(one["top_logprobs"]) == 2 for one in wanted)
    (item,) = respond(client, **asked).output
    assert [one.to_dict() for one in item.content[0].logprobs] == wanted
    events = list(respond(client, **asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [one.to_dict() for event in deltas for one in event.logprobs] == wanted
    assert [one.to_dict() for one in events[-1].response.output[0].content[0].logprobs] == wanted
    assert respond(client, max_output_tokens=2).output[0].content[0].logprobs == []
    with pytest.raises(openai.BadRequestError, match=r"needs .message\.output_text\.logprobs."):
        respond(client, top_logprobs=2)


def test_what_a_response_would_read_is_counted(client):
    options = {"instructions": "Be brief.", "tools": [TOOL]}
    counted = client.responses.input_tokens.count(model="a", input="Who?", **options, extra_body=QUIET)
    assert counted.input_tokens == respond(client, model="a", max_output_tokens=1, **options).usage.input_tokens > 100
    with pytest.raises(openai.NotFoundError):
        client.responses.input_tokens.count(model="nobody", input="Who?")


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
        told = answer.json()
        if path.startswith("/api/"):  # Ollama's clients show `error` as it is
            assert isinstance(told["error"], str) and "tokens" in told["error"]
        else:
            told = told["error"]
        assert answer.status_code == 400 and told["param"] == field, path


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
    whole = client.embeddings.create(model="a", input=ids, dimensions=64)
    assert np.allclose(whole.data[1].embedding, wanted[1], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="64 numbers") as caught:
        client.embeddings.create(model="a", input=ids, dimensions=16)
    assert caught.value.param == "dimensions"
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
        for nothing in (0, "0", "0s", "0m"):
            gone = httpx.post(address + path, json={"model": "a", "keep_alive": nothing, **empty}).json()
            assert (gone["done"], gone["done_reason"]) == (True, "unload")
    listed = httpx.get(address + "/api/tags").json()["models"]
    assert [m["name"] for m in listed][:2] == ["base", "a"]
    digests = [m["digest"] for m in listed]
    assert len(set(digests)) == len(digests) and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    size = (server[2].base.folder / "model.safetensors").stat().st_size
    adapter = sum(weight.nbytes for weight in random_adapter(server[2], seed=1).weights.values())
    assert [m["size"] for m in listed][:2] == [size, size + adapter]
    held = {m["name"]: m["digest"] for m in httpx.get(address + "/api/ps").json()["models"]}
    assert held["base"] == digests[0]


def test_ollama_takes_a_prompt_as_it_is_and_a_schema_with_it(server, client):
    options, asked = {"temperature": 0, "num_predict": 8}, {"model": "a", "temperature": 0, "max_tokens": 8}
    wanted = client.completions.create(**asked, prompt="Who is").choices[0].text
    body = {"model": "a", "prompt": "Who is", "raw": True, "options": options}
    lines = httpx.post(server[0] + "/api/generate", json=body).text.splitlines()
    assert "".join(json.loads(line)["response"] for line in lines) == wanted
    formed = body | {"format": PERSON, "options": {**options, "num_predict": 200}, "stream": False}
    answer = json.loads(httpx.post(server[0] + "/api/generate", json=formed).json()["response"])
    assert set(answer) == {"name", "old"}
    assert (
        httpx.post(
            server[0] + "/api/chat", json={"model": "a", "messages": [{"role": "user", "content": "Hi"}], "raw": True}
        ).status_code
        == 400
    )


def test_ollamas_embeddings_are_of_length_one_and_of_one_text_the_mean_itself(server, client):
    texts = ["Who?", "What is it?"]
    means = np.array([one.embedding for one in client.embeddings.create(model="a", input=texts).data])
    embed = lambda path="", **body: httpx.post(f"{server[0]}/api/embed{path}", json={"model": "a:latest", **body})  # noqa: E731
    told = embed(input=texts, truncate=True, keep_alive="5m", options={"num_ctx": 2048}).json()
    assert np.allclose(told["embeddings"], means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)
    assert told["model"] == "a" and told["prompt_eval_count"] > 2 and told["total_duration"] > 0
    assert np.allclose(embed("dings", prompt=texts[1]).json()["embedding"], means[1], atol=1e-5)
    assert "dimensions" in embed(input="Who?", dimensions=16).text
    for wrong in ({}, {"input": ""}, {"input": 3}, {"input": "Who?", "mirostat": 1}, {"input": "a " * 100_000}):
        assert embed(**wrong).status_code == 400 and embed(**wrong).json()["error"]


def test_ollamas_show_tells_what_a_model_is(server):
    show = lambda **body: httpx.post(server[0] + "/api/show", json=body)  # noqa: E731
    base, adapter = show(model="base").json(), show(model="a:latest", verbose=True).json()
    info = base["model_info"]
    assert (info["general.architecture"], info["llama.context_length"]) == ("llama", 4096)
    assert (info["llama.embedding_length"], info["llama.block_count"]) == (64, 2)
    assert info["general.parameter_count"] == 106816 and base["details"]["parameter_size"] == "0.11M"
    assert set(base["capabilities"]) == {"completion", "tools", "thinking"} and "message" in base["template"]
    assert (base["modelfile"], adapter["modelfile"]) == ("FROM base\n", "FROM base\nADAPTER a\n")
    assert adapter["details"]["parent_model"] == "base" and adapter["model_info"] == info
    listed = {one["name"]: one["details"] for one in httpx.get(server[0] + "/api/tags").json()["models"]}
    assert listed["base"] == base["details"] and listed["a"] == adapter["details"]
    assert show(model="nobody").status_code == 404 and show().status_code == 400
    assert (
        "does not exist" in show(model="nobody").json()["error"]
        and "path" in httpx.get(server[0] + "/api/nothing").json()["error"]
    )
    assert show(name="a").json() == adapter  # as older clients call it
    running = httpx.get(server[0] + "/api/ps").json()["models"]
    assert [one["name"] for one in running] == ["base", "a"] and running[1]["details"] == adapter["details"]


def test_an_error_after_the_beginning_of_a_response_is_an_event():
    writer = ResponseWriter.__new__(ResponseWriter)
    writer._number = 4
    error = {"message": "The engine stopped.", "type": "server_error", "param": None, "code": None}
    name, data = writer.frame({"error": error}).decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == error | {"type": "error", "sequence_number": 4}


def test_ollamas_log_probabilities_are_openais_whole_and_by_lines(server, client):
    talk = [{"role": "user", "content": "Name a colour ü😀"}]
    chat = client.chat.completions.create(
        model="a", messages=talk, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2, extra_body=QUIET
    )
    wanted = [entry.model_dump() for entry in chat.choices[0].logprobs.content]
    options = {"temperature": 0, "num_predict": 6}
    asked = {"model": "a", "options": options, "think": False, "logprobs": True, "top_logprobs": 2}
    for path, given in (("chat", {"messages": talk}), ("generate", {"prompt": talk[0]["content"]})):
        post = lambda path=path, **body: httpx.post(f"{server[0]}/api/{path}", json=body)  # noqa: E731
        whole = post(**asked, **given, stream=False).json()
        assert len(wanted) == 6 and whole["logprobs"] == wanted
        lines = [json.loads(line) for line in post(**asked, **given).text.splitlines()]
        assert [entry for line in lines for entry in line.get("logprobs", [])] == whole["logprobs"]
        assert "logprobs" not in post(**asked | {"logprobs": False, "top_logprobs": 0}, **given, stream=False).json()
        assert "'logprobs'" in post(**asked | {"logprobs": False}, **given).json()["error"]
        assert "20" in post(**asked | {"top_logprobs": 21}, **given).json()["error"]


def test_what_ollamas_clients_send_is_told_of_in_their_names(server):
    body = {"model": "a", "messages": [{"role": "user", "content": "Who?"}], "think": False, "stream": False}

    def said(path="chat", options=None, **more):
        options = {"temperature": 0, "num_predict": 8} | (options or {})
        return httpx.post(f"{server[0]}/api/{path}", json=body | {"options": options} | more).json()

    plain = said()["message"]["content"]
    for options in ({"repeat_last_n": 0, "repeat_penalty": 50.0, "presence_penalty": 90}, {"repeat_last_n": -1}):
        assert said(options=options)["message"]["content"] == plain
    strong = {"repeat_penalty": 50.0}
    everywhere = said(options=strong)["message"]["content"]
    assert everywhere != plain and said(options=strong | {"repeat_last_n": -1})["message"]["content"] == everywhere
    silent = [{"role": role, "content": "", "tool_name": "look"} for role in ("user", "assistant", "tool")]
    left_out = [{key: text for key, text in one.items() if text} for one in silent]  # as ollama's own client does
    whole, short = (
        said(messages=[*body["messages"], *said_nothing, body["messages"][0]]) for said_nothing in (silent, left_out)
    )
    assert short["message"] == whole["message"] and short["prompt_eval_count"] == whole["prompt_eval_count"]
    machine = {"use_mlock": True, "f16_kv": True, "num_gqa": 1, "penalize_newline": True, "mirostat_tau": 5.0}
    assert said(options=machine)["message"]["content"] == plain
    for name, value in (("repeat_last_n", -2), ("repeat_last_n", "x"), ("repeat_penalty", -1)):
        assert f"'options.{name}'" in said(options={name: value})["error"]
    for wrong in ("banana", 3, "", ["low"]):
        assert "'think' must be" in said(think=wrong)["error"]
    for wrong in ("yaml", 5):
        assert "'format' must be 'json'" in said(format=wrong)["error"]
    prompt = {"prompt": "Who?", "raw": True, "messages": None}
    assert said("generate", **prompt, think=None)["response"]
    assert "'system'" in said("generate", **prompt, think=None, system="Be brief.")["error"]
    for wrong in (["Who?", "What?"], [1, 2]):  # one text alone, as there: the others' vectors would be lost
        told = httpx.post(server[0] + "/api/embeddings", json={"model": "a", "prompt": wrong}).json()
        assert "'prompt' must be a string" in told["error"]


def test_an_encoding_of_vectors_that_there_is_not_is_refused(server):
    asked = {"model": "a", "input": "Who?"}
    post = lambda **more: httpx.post(server[0] + "/v1/embeddings", json=asked | more)  # noqa: E731
    assert post(encoding_format="float").json()["data"] == post().json()["data"]
    assert post(encoding_format="int8").json()["error"]["param"] == "encoding_format"
    for wrong in (["x"] * 1025, "", [""]):
        told = post(input=wrong).json()["error"]["message"]
        assert "not empty" in told and "up to 1024" in told


def test_items_of_a_response_are_in_the_order_in_which_they_were_written(client):
    """The model begins with text and thinks later: each token belongs to the text that it wrote."""
    tokenizer = chat_tokenizer("qwen3")
    think = tokenizer.encode("<think>", add_special_tokens=False)[0]
    asked = {"include": ["message.output_text.logprobs"], "temperature": 1, "max_output_tokens": 60}
    seen = 0
    for seed in range(6):
        body = QUIET | {"seed": seed, "logit_bias": {str(think): 4}}
        whole = respond(client, **asked, extra_body=body)
        streamed = list(respond(client, **asked, extra_body=body, stream=True))[-1].response
        items = [item.model_dump(exclude={"id"}) for item in whole.output]
        assert items == [item.model_dump(exclude={"id"}) for item in streamed.output]
        for item in whole.output:
            if item.type == "message":
                (part,) = item.content
                assert part.logprobs[0].token.strip() in part.text[: len(part.logprobs[0].token)]
        kinds = [item.type for item in whole.output]
        seen += kinds[:2] == ["message", "reasoning"]
    assert seen
    stopped = {"stop": ["e", "an", "\n"], "seed": 9}  # a stop word's token is told of as in a chat
    items = respond(client, **asked | {"temperature": 1}, extra_body=QUIET | stopped).output
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Who?"}], max_tokens=60, logprobs=True,
        extra_body=QUIET | stopped,
    ).choices[0]  # fmt: skip
    told = [(one.token, one.logprob) for one in items[-1].content[0].logprobs]
    assert chat.finish_reason == "stop" and told == [(one.token, one.logprob) for one in chat.logprobs.content]


def test_log_probabilities_of_the_text_are_not_of_the_reasoning(client):
    """Clients put the answer together of its tokens; those of the reasoning are told beside them."""
    tokenizer = chat_tokenizer("qwen3")
    think, close, *some = tokenizer.encode("<think></think>It is sunny in Paris. Thank you", add_special_tokens=False)
    plain = lambda text: "".join(text.split())  # noqa: E731
    joined = lambda entries: plain(bytes(b for entry in entries for b in entry["bytes"]).decode())  # noqa: E731
    seen = 0
    for seed in range(4):
        bias = {str(token): 50 for token in some} | {str(think): 49, str(close): 51}
        body = QUIET | {"seed": seed, "logit_bias": bias}
        asked = dict(model="base", messages=[{"role": "user", "content": "Who?"}], max_tokens=60, logprobs=True)
        choice = client.chat.completions.create(**asked, extra_body=body).choices[0].to_dict()
        told, message = choice["logprobs"], choice["message"]
        assert joined(told["content"]) == plain(message["content"])
        assert joined(told.get("reasoning_content", [])) == plain(message.get("reasoning_content", ""))
        seen += bool(told["content"] and told.get("reasoning_content"))
        chunks = [
            chunk.choices[0].to_dict()
            for chunk in client.chat.completions.create(**asked, stream=True, extra_body=body)
        ]
        for kind in ("content", "reasoning_content"):
            pieces = [entry for chunk in chunks for entry in (chunk["logprobs"] or {}).get(kind, [])]
            assert pieces == told.get(kind, [])
        items = respond(
            client, include=["message.output_text.logprobs"], temperature=1, max_output_tokens=60, extra_body=body
        )
        texts = [part for item in items.output if item.type == "message" for part in item.content]
        assert [one.to_dict() for part in texts for one in part.logprobs] == told["content"]
    assert seen


def test_what_a_response_asks_of_the_reasoning_is_refused_by_its_place(server):
    post = lambda **reasoning: httpx.post(  # noqa: E731
        server[0] + "/v1/responses",
        json={"model": "a", "input": "Who?", "max_output_tokens": 2, "reasoning": reasoning},
    )
    assert post(effort="low", summary="auto", context="auto", mode="standard").status_code == 200
    for wrong in ({"effort": "mega"}, {"effort": 3}, {"efort": "low"}, {"context": "all_turns"}):
        (name,) = wrong
        assert post(**wrong).json()["error"]["param"] == f"reasoning.{name}"
        assert f"reasoning.{name}" in post(**wrong).json()["error"]["message"]


def test_an_adapter_to_unload_must_be_named(server):
    assert httpx.post(server[0] + "/v1/unload_lora_adapter", json={}).status_code == 400
    told = httpx.post(server[0] + "/v1/completions", json={"model": "bases", "prompt": "x"}).json()["error"]["message"]
    assert told.endswith(". Did you mean 'base'?")


def test_the_servers_limit_is_told_of_by_the_clients_own_name(tmp_path):
    talk = [{"role": "user", "content": "Who?"}]
    with running(write_base(tmp_path / "qwen3", "qwen3"), [], max_tokens=64) as (address, _):
        for path, name, body in (
            ("/v1/chat/completions", "max_tokens", {"messages": talk, "max_tokens": 65}),
            ("/v1/completions", "max_tokens", {"prompt": "Who?", "max_tokens": 65}),
            ("/v1/responses", "max_output_tokens", {"input": "Who?", "max_output_tokens": 65}),
            ("/api/chat", "options.num_predict", {"messages": talk, "options": {"num_predict": 65}}),
            ("/api/generate", "options.num_predict", {"prompt": "Who?", "options": {"num_predict": 65}}),
        ):
            told = httpx.post(address + path, json={"model": "base", **body}).json()
            told = told if path.startswith("/api/") else told["error"]
            assert told["param"] == name and f"'{name}' may be at most 64 here." in (told.get("error"), told["message"])


def test_ollama_counts_writing_from_the_first_token_on_not_from_the_first_text(server, monkeypatch):
    """The parts of characters are tokens without a text: all of it comes with the last one."""
    tokenizer, told, jobs, pieces = server[1].model.tokenizer, [], [], []
    monkeypatch.setattr(OllamaWriter, "note", lambda self, *piece: pieces.append(piece))
    part = next(i for i in range(server[1].model.vocabulary) if "\ufffd" in tokenizer.decode([i]))
    ending, begun = OllamaWriter._ending, Job.begun
    monkeypatch.setattr(
        OllamaWriter, "_ending", lambda self, *given: told.append((self._first, given[0])) or ending(self, *given)
    )
    monkeypatch.setattr(Job, "begun", lambda self, metrics: jobs.append(self) or begun(self, metrics))
    options = {"temperature": 0, "num_predict": 9, "logit_bias": {str(part): 100}}
    body = {"model": "a", "messages": [{"role": "user", "content": "Who?"}], "options": options, "stream": False}
    assert httpx.post(server[0] + "/api/chat", json=body | {"think": False}).json()["eval_count"] == 9
    ((first, _),), (job,) = told, jobs
    assert len(pieces) == 1 and first == int(job.first * 1e9)
