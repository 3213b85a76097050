"""What requests may ask of sampling and of the form of an answer, asked for by OpenAI's own client."""

import ast
import dataclasses
import inspect

import httpx
import openai
import pytest
from helpers.serving import running

from mlx_adapters.config.sampling import Sampling
from mlx_adapters.protocols.options import read_sampling

PROMPT, CHAT = "List all students.", [{"role": "user", "content": "List all students."}]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(tmp_path_factory.mktemp("home")))
        with running(tiny_model("llama"), [], max_batch=8) as (address, engine):
            yield address, engine.model


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)


def test_several_answers_of_one_request(client):
    options = dict(model="base", messages=CHAT, n=3, seed=7, max_tokens=8, temperature=1.0)
    whole = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert whole.usage.completion_tokens <= 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    alone = client.chat.completions.create(**options | {"n": 1}).choices[0].message.content
    assert alone == texts[0]


def test_lists_of_prompts_and_echo(client, server):
    tokenizer = server[1].tokenizer
    options = dict(model="base", max_tokens=4, temperature=0, n=2, echo=True)
    prompts = [PROMPT, "How many?"]
    answer = client.completions.create(prompt=prompts, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(prompts[i // 2]) for i, choice in enumerate(answer.choices)] == [True] * 4
    ids = client.completions.create(prompt=[list(tokenizer.encode(p)) for p in prompts], **options)
    assert [c.text for c in ids.choices] == [c.text for c in answer.choices]
    texts = [""] * 4
    for chunk in client.completions.create(prompt=prompts, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_a_completions_tokens_are_told_as_its_text_has_them(client, server):
    """Where they begin, the one that was chosen among the likeliest, and parts of a character each by its bytes."""
    prompt = "Liste ü€😀 auf: "
    bias = {str(token): 40 for token in server[1].tokenizer.encode("List all students")}
    options = dict(model="base", prompt=prompt, seed=3, max_tokens=24, logprobs=5, echo=True, logit_bias=bias)
    choice = client.completions.create(**options).choices[0]
    told, text = choice.logprobs, choice.text
    parts = [token for token in told.tokens if token.startswith("bytes:")]
    assert r"bytes:\xc3" in parts and "\ufffd" not in "".join(told.tokens)
    for token, at in zip(told.tokens, told.text_offset, strict=True):
        assert token in parts or text.startswith(token, at)
    assert len(prompt) in told.text_offset and told.text_offset == sorted(told.text_offset)
    for token, logprob, top in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert top[token] == logprob and len(top) <= 6
    assert any(len([one for one in top if one.startswith("bytes:")]) > 1 for top in told.top_logprobs[1:])
    alone = client.completions.create(**options | {"logprobs": 0}).choices[0].logprobs
    assert alone.top_logprobs[1:] == [{t: p} for t, p in zip(told.tokens[1:], told.token_logprobs[1:], strict=True)]
    pieces = [one.choices[0].logprobs for one in client.completions.create(**options, stream=True)]
    assert [at for one in pieces if one for at in one.text_offset] == told.text_offset


def test_bytes_of_a_chats_tokens_put_its_characters_together(client, server):
    bias = {str(token): 30 for token in server[1].tokenizer.encode("ü€😀")}
    choice = client.chat.completions.create(
        model="base", messages=CHAT, temperature=1, seed=1, max_tokens=60, logprobs=True, logit_bias=bias
    ).choices[0]
    entries = choice.logprobs.content
    assert any(entry.token == "\ufffd" for entry in entries)
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == choice.message.content


@pytest.mark.parametrize("most", [0, 1])
def test_an_echo_tells_the_prompts_log_probabilities(client, server, most):
    """As lm-evaluation-harness asks for them."""
    import mlx.core as mx

    model = server[1]
    ids = list(model.tokenizer.encode(PROMPT * 30))  # several pieces
    answer = client.completions.create(
        model="base", prompt=[ids], max_tokens=most, temperature=0, logprobs=1, echo=True, seed=1234
    )
    told = answer.choices[0].logprobs
    logits = model.logits(ids)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = [logs[i, token].item() for i, token in enumerate(ids[1:])]
    assert told.token_logprobs[0] is None and len(told.tokens) == len(ids) + most
    assert told.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
    best = [logs[i].max().item() for i in range(len(ids) - 1)]
    assert [max(one.values()) for one in told.top_logprobs[1 : len(ids)]] == pytest.approx(best, abs=1e-4)
    assert answer.usage.completion_tokens == most


def test_bias_penalties_and_ends(client, server):
    tokenizer = server[1].tokenizer
    options = dict(model="base", messages=CHAT, temperature=0, max_tokens=12, logprobs=True)

    def tokens(**more):
        answer = client.chat.completions.create(**options, **more).choices[0]
        return [entry.token for entry in answer.logprobs.content], answer

    plain, _ = tokens()
    forced, _ = tokens(logit_bias={"40": 100})
    assert set(forced) == {tokenizer.decode([40])}
    once, _ = tokens(logit_bias={"40": 100}, frequency_penalty=60)
    assert once[:2] == [tokenizer.decode([40])] * 2 and len(set(once)) > 1
    repeated, _ = tokens(extra_body={"repetition_penalty": 100.0})
    assert len(set(repeated)) >= len(set(plain))
    ended, answer = tokens(logit_bias={"40": 100}, extra_body={"stop_token_ids": [40]})
    assert not ended and answer.finish_reason == "stop" and answer.message.content == ""
    later, answer = tokens(logit_bias={"40": 100}, extra_body={"stop_token_ids": [40], "min_tokens": 3})
    assert len(later) == 3 and answer.finish_reason == "stop"
    eos = str(next(iter(tokenizer.eos_token_ids)))
    stopped, answer = tokens(logit_bias={eos: 100})
    assert not stopped and answer.finish_reason == "stop"
    onward, answer = tokens(logit_bias={eos: 100}, extra_body={"ignore_eos": True})
    assert len(onward) == 12 and answer.finish_reason == "length"


def test_a_token_is_biased_once_and_a_shortest_answer_is_not_longer_than_the_longest(server):
    chat = server[0] + "/v1/chat/completions", {"messages": CHAT}
    for (url, body), more, param in (
        (chat, {"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        (chat, {"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        (chat, {"min_tokens": 4, "max_completion_tokens": 3}, "min_tokens"),
        (chat, {"min_tokens": 1_000_000}, "min_tokens"),
        ((server[0] + "/v1/completions", {"prompt": "Who?"}), {"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
    ):
        refused = httpx.post(url, json={"model": "base", **body, **more})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == param
        assert param == "logit_bias" or " may be written." in error["message"]
    echo = {"model": "base", "prompt": "Who?", "echo": True, "max_tokens": 0}
    for least in (1, 4):
        refused = httpx.post(server[0] + "/v1/completions", json={**echo, "min_tokens": least})
        assert refused.json()["error"]["message"] == f"'min_tokens' is {least}, and 0 may be written."
    assert httpx.post(server[0] + "/v1/completions", json=echo).json()["choices"][0]["text"] == "Who?"
    fits = httpx.post(chat[0], json={"model": "base", **chat[1], "min_tokens": 3, "max_tokens": 3})
    assert fits.json()["usage"]["completion_tokens"] == 3


def test_filters_and_stops(client):
    options = dict(model="base", messages=CHAT, max_tokens=16, temperature=1.5, seed=3)
    greedy = client.chat.completions.create(**options | {"temperature": 0}).choices[0].message.content
    for more in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": 1, "xtc_probability": 0.0}):
        assert client.chat.completions.create(**options, extra_body=more).choices[0].message.content == greedy
    without = client.chat.completions.create(**options, extra_body={"xtc_probability": 1.0, "xtc_threshold": 0.0001})
    assert without.choices[0].message.content != client.chat.completions.create(**options).choices[0].message.content
    stops = [f"nothing {i}" for i in range(50)] + [greedy[4:7]]
    cut = client.chat.completions.create(**options | {"temperature": 0}, stop=stops).choices[0]
    assert cut.message.content == greedy[: greedy.index(greedy[4:7])] and cut.finish_reason == "stop"
    limit = client.chat.completions.create(**options | {"max_tokens": None}, max_completion_tokens=3)
    assert limit.usage.completion_tokens == 3


NEUTRAL = {
    "functions": None,
    "guided_json": None,
    "best_of": 1,
    "audio": None,
    "draft_model": "",
    "tools": [],
    "n": None,
}


def test_what_means_nothing_passes_and_what_would_change_the_answer_is_refused(server, tiny_model):
    url, body = server[0] + "/v1/chat/completions", {"model": "base", "messages": CHAT, "max_tokens": 2}
    more = {"user": "me", "metadata": {"a": "b"}, "store": True, "skip_special_tokens": True, "logit_bias": {}}
    more |= {"prediction": {"type": "content", "content": "List them."}}  # it may be written sooner, and is the same
    assert httpx.post(url, json=body | NEUTRAL | more).status_code == 200
    for name, value in (("top_q", 3), ("guided_regex", "a+"), ("typical_p", 0.5), ("web_search_options", {"a": 1})):
        error = httpx.post(url, json=body | {name: value})
        assert error.status_code == 400 and error.json()["error"]["param"] == name and name in error.text
    empty = {"stop": "", "logit_bias": [], "tools": {}, "stream_options": "", "response_format": {}, "tool_choice": ""}
    empty |= {"reasoning_effort": "", "user": "", "chat_template_kwargs": [], "seed": "", "stop_token_ids": ""}
    assert httpx.post(url, json=body | empty).status_code == 200
    completion, plain = server[0] + "/v1/completions", {"model": "base", "prompt": PROMPT, "max_tokens": 2}
    for n, best, status in ((2, 2, 200), (1, 1, 200), (1, 2, 400), (2, 3, 400)):  # of as many as are given: all
        assert httpx.post(completion, json=plain | {"n": n, "best_of": best}).status_code == status
    with running(tiny_model("llama"), [], lenient=True) as (address, _):
        answer = httpx.post(address + "/v1/chat/completions", json=body | {"top_q": 3, "typical_p": 0.5})
        assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "top_q, typical_p"
        nested = body | {"stream": True, "stream_options": {"include_usage": True, "every": 3}}
        answer = httpx.post(address + "/v1/chat/completions", json=nested)
        assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "stream_options.every"
        assert "x-ignored-fields" not in httpx.post(address + "/v1/chat/completions", json=body).headers
        assert httpx.post(address + "/v1/chat/completions", json=body | {"top_p": "x"}).status_code == 400


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "reasoning_effort"),
    ],
)
def test_what_is_asked_twice_is_asked_alike(server, given, place):
    """Else one of them would be passed over."""
    body, url = {"model": "base", "messages": CHAT, "max_tokens": 2}, server[0] + "/v1/chat/completions"
    error = httpx.post(url, json=body | given)
    assert error.status_code == 400 and error.json()["error"]["param"] == place
    alike = {"max_completion_tokens": 2, "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}}
    assert httpx.post(url, json=body | alike).status_code == 200


def test_every_way_to_choose_tokens_can_be_asked_for():
    """Else a new option would be refused by the server as unknown."""
    (call,) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(read_sampling)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Sampling"
    ]
    asked = {keyword.arg for keyword in call.keywords}
    assert asked == {field.name for field in dataclasses.fields(Sampling)}
