"""The server, asked by OpenAI's own client and by clients that mean no good."""

import contextlib
import json
import socket
import sys
import threading
import time
from urllib.parse import unquote

import httpx
import mlx.core as mx
import openai
import pytest
from helpers.adapters import random_adapter
from helpers.serving import eventually, running

from mlx_adapters.errors import ConfigError, IncompatibleError
from mlx_adapters.generation.live import load_model
from mlx_adapters.serving.metrics import Metrics
from mlx_adapters.serving.settings import ServeSettings, is_loopback, parse_split
from mlx_adapters.serving.start import bind, make_engine, parse_adapter, read_keys
from mlx_adapters.sources.registry import adapter_folder, register
from mlx_adapters.system.machine import on_gpu

PROMPT = "List all students."
JSON = {"Content-Type": "application/json"}
CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def module_home(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(autouse=True)
def home(module_home, monkeypatch):
    """One home for all tests here: the server lives longer than a test."""
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(module_home))


@pytest.fixture(scope="module")
def server(tiny_model, module_home):
    """One server for most tests: adapters a, b, c, of which two fit into memory, and d in the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(module_home))
        folder = tiny_model("llama")
        model = load_model(folder)
        for i, name in enumerate("abcd"):
            register(random_adapter(model, seed=i + 1, rank=2 + i), name)
        split = parse_split("test=a:0.5,b:0.5")
        settings = {"max_adapters": 2, "max_batch": 4, "splits": (split,), "allow_load": True, "max_queue": 64}
        with running(folder, [(n, n) for n in "abc"], **settings) as (address, engine):
            yield address, engine, model


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="unused", max_retries=0)


def alone(model, name, max_tokens=8, messages=CHAT):
    """What the adapter writes greedily, by itself."""
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    with model.using(None if name == "base" else name):
        return model.generate(list(ids), max_tokens=max_tokens).text


def test_models_and_unknown_names(client):
    assert [m.id for m in client.models.list()] == ["base", "a", "b", "c", "test"]
    assert client.models.retrieve("a").parent == "base"
    with pytest.raises(openai.NotFoundError, match=r"does not exist. Served: base, a, b, c, test") as caught:
        client.chat.completions.create(model="aa", messages=CHAT)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("name", ["base", "a", "b", "c"])
def test_chat_is_the_solo_run(client, server, name):
    answer = client.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == alone(server[2], name)
    assert answer.model == name and answer.choices[0].finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8


def test_streaming_with_usage_and_logprobs(client, server):
    options = dict(model="a", messages=CHAT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    client.chat.completions.create(**options)  # both find the prompt read
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content == alone(server[2], "a")
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in whole.choices[0].logprobs.content]
    assert len(streamed) == 8
    for entry in streamed:
        assert len(entry.top_logprobs) == 3 and entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)


def test_completions(client, server):
    model = server[2]
    with model.using("b"):
        wanted = model.generate(PROMPT, max_tokens=6, raw=True).text
    answer = client.completions.create(model="b", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
    assert answer.choices[0].text == wanted and len(answer.choices[0].logprobs.tokens) == 6
    ids = model.tokenizer.encode(PROMPT)
    streamed = client.completions.create(model="b", prompt=list(ids), temperature=0, max_tokens=6, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == wanted


def test_a_completion_continues_its_prompt_to_the_space(client):
    spaces = 0
    for prompt in range(10, 40):
        answer = client.completions.create(model="a", prompt=[prompt], temperature=0, max_tokens=4, logprobs=0)
        choice = answer.choices[0]
        assert choice.text.startswith(" ") == choice.logprobs.tokens[0].startswith(" ")
        spaces += choice.text.startswith(" ")
    assert spaces > 0


def test_a_token_that_is_part_of_a_character_has_bytes_of_its_own(client, server):
    answer = client.chat.completions.create(
        model="base", messages=CHAT, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20
    )
    entries = answer.choices[0].logprobs.content[0].top_logprobs
    assert any("\ufffd" in entry.token for entry in entries)
    for entry in entries:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert (entry.bytes == list(entry.token.encode())) == ("\ufffd" not in entry.token)


def test_a_temperature_next_to_0_is_greedy(client, server):
    for temperature in (1e-300, 1e-40, 1e-7):
        answer = client.chat.completions.create(model="a", messages=CHAT, temperature=temperature, max_tokens=8)
        assert answer.choices[0].message.content == alone(server[2], "a")


def test_seed_temperature_and_stop(client):
    options = dict(model="a", messages=CHAT, max_tokens=24, temperature=1.0, top_p=0.9)
    one, two = (client.chat.completions.create(**options, seed=7).choices[0].message.content for _ in range(2))
    assert one == two != client.chat.completions.create(**options, seed=8).choices[0].message.content
    word = one[5:8]
    cut = client.chat.completions.create(**options, seed=7, stop=[word])
    assert cut.choices[0].message.content == one[: one.index(word)] and cut.choices[0].finish_reason == "stop"


def test_split_is_stable_and_shown(client, server):
    def arm(user):
        answer = client.chat.completions.with_raw_response.create(
            model="test", messages=CHAT, user=user, max_tokens=2, temperature=0
        )
        assert answer.headers["x-adapter"] == answer.parse().model
        return answer.parse().model

    arms = {user: arm(user) for user in map(str, range(12))}
    assert set(arms.values()) == {"a", "b"} and all(arm(user) == arms[user] for user in ("0", "5"))
    split = parse_split("t=x:0.2,y:0.8")
    share = sum(split.choose(str(user)) == "x" for user in range(4000)) / 4000
    assert abs(share - 0.2) < 0.03


BAD = [
    (b"{", "valid JSON"),
    (b'{"model": "a", "messages": \xff}', "valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[]", "JSON object"),
    ({"messages": CHAT}, "'model'"),
    ({"model": 3, "messages": CHAT}, "'model' must be a string"),
    ({"model": "a"}, "'messages'"),
    ({"model": "a", "messages": []}, "at least one"),
    ({"model": "a", "messages": "hi"}, "'messages'"),
    ({"model": "a", "messages": [3]}, "must be an object"),
    ({"model": "a", "messages": [{"role": "x", "content": "y"}]}, "role"),
    ({"model": "a", "messages": [{"role": "user", "content": None}]}, "content"),
    ({"model": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    ({"model": "a", "messages": CHAT, "max_tokens": 0}, "max_tokens"),
    ({"model": "a", "messages": CHAT, "max_tokens": -1}, "max_tokens"),
    ({"model": "a", "messages": CHAT, "max_tokens": 1.5}, "an integer"),
    ({"model": "a", "messages": CHAT, "max_tokens": 10**30}, "context"),
    ({"model": "a", "messages": CHAT, "max_tokens": True}, "an integer"),
    ({"model": "a", "messages": CHAT, "temperature": "hot"}, "a number"),
    ({"model": "a", "messages": CHAT, "temperature": 1e400}, "too large a number"),
    ({"model": "a", "messages": CHAT, "max_tokens": 1e400}, "too large a number"),
    ({"model": "a", "messages": CHAT, "temperature": 10**4000}, "temperature"),
    ({"model": "\ud800", "messages": CHAT}, "Unicode"),
    ({"model": "a", "messages": CHAT, "\udfff": 1}, "Unicode"),
    ({"model": "a", "messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
    (b'{"model": "a", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', "Unicode"),
    ({"model": "a", "messages": [{"role": "user", "content": []}]}, "content"),
    ({"model": "a", "messages": CHAT, "temperature": -1}, "temperature"),
    ({"model": "a", "messages": CHAT, "top_p": 2}, "top_p"),
    ({"model": "a", "messages": CHAT, "seed": 2**70}, "seed"),
    ({"model": "a", "messages": CHAT, "stop": ["a"] * 2000}, "stop"),
    ({"model": "a", "messages": CHAT, "stop": [""]}, "stop"),
    ({"model": "a", "messages": CHAT, "stream": "yes"}, "boolean"),
    ({"model": "a", "messages": CHAT, "best_of": 2}, "does not support 'best_of'"),
    ({"model": "a", "messages": CHAT, "n": 500}, "'n' must be at least 1 and at most 128"),
    ({"model": "a", "messages": CHAT, "tools": [{}]}, "'tools[0]'"),
    ({"model": "a", "messages": CHAT, "temprature": 1}, "Did you mean 'temperature'"),
    (b'{"model": "a", "seed": ' + b"9" * 5000 + b"}", "JSON: 99999999999999999999... is too large a number"),
    ({"model": "a", "messages": CHAT, "top_logprobs": 2}, "needs 'logprobs'"),
    ({"model": "a", "messages": CHAT, "chat_template_kwargs": {"messages": []}}, "'messages' cannot be given"),
    ({"model": "a", "messages": [{"role": "user", "content": "x " * 9000}]}, "context"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_a_400_in_openais_form(server, body, message):
    content = body if isinstance(body, bytes) else json.dumps(body).replace("Infinity", "1e400").encode()
    answer = httpx.post(server[0] + "/v1/chat/completions", content=content, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["type"] == "invalid_request_error"
    assert httpx.get(server[0] + "/health").status_code == 200


def test_other_bad_input(server):
    address = server[0]
    assert httpx.post(address + "/v1/chat/completions", content=b" " * (1 << 21), headers=JSON).status_code == 413
    for prompt in ("", [], [10**9], [-1], [1.5], ["a", 3], ["a", ""], {"a": 1}, None):
        answer = httpx.post(address + "/v1/completions", json={"model": "a", "prompt": prompt})
        assert answer.status_code == 400 and "prompt" in answer.json()["error"]["message"]
    for tokens, asked in ((2049, 1), (2048, 2), (2000, 50)):
        body = {"model": "a", "prompt": [5] * tokens, "max_tokens": asked}
        long = httpx.post(address + "/v1/completions", json=body).json()["error"]
        assert long["code"] == "context_length_exceeded" and long["param"] == "prompt"
    body = {"model": "a", "prompt": [5] * 2048}  # as in `generate`
    whole = httpx.post(address + "/v1/completions", json=body, timeout=120)  # a GPU compiles its kernels first
    assert whole.status_code == 200 and whole.json()["usage"]["completion_tokens"] == 1
    assert httpx.get(address + "/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(address + "/v1/completions").status_code == 405


def test_loading_and_unloading(server, client):
    address, engine, model = server
    post = lambda **body: httpx.post(address + "/v1/adapters", json=body)  # noqa: E731
    assert post(name="e", reference="./folder").status_code == 403
    assert post(name="e", reference="nothing").status_code == 404
    assert post(name="a").status_code == 409
    assert post(name="../x", reference="d").status_code == 400
    assert post(name="d").json()["parent"] == "base"
    answer = client.chat.completions.create(model="d", messages=CHAT, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == alone(model, "d")
    stream = client.chat.completions.create(model="d", messages=CHAT, temperature=0, max_tokens=400, stream=True)
    next(iter(stream))
    assert httpx.delete(address + "/v1/adapters/d").json() == {"id": "d", "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="d", messages=CHAT)
    rest = "".join(c.choices[0].delta.content or "" for c in stream)
    assert alone(model, "d", 400).endswith(rest) and len(rest) > 100
    assert httpx.delete(address + "/v1/adapters/d").status_code == 404
    assert httpx.delete(address + "/v1/adapters/a").status_code == 409
    assert eventually(lambda: not any(name.startswith("d#") for name in engine.model.pool.attached))
    assert len(engine.model.pool.attached) <= 2


def test_leaving_frees_the_place(server):
    address, engine, _ = server
    body = {"model": "a", "messages": CHAT, "max_tokens": 1500, "temperature": 0, "stream": True}
    with httpx.stream("POST", address + "/v1/chat/completions", json=body):  # begins before the first token
        assert eventually(lambda: len(engine._batcher.rows) == 1)
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(address + "/v1/chat/completions", json=body | {"stream": False}, timeout=0.2)
    assert eventually(lambda: engine._batcher.idle and not engine._open)
    assert all(entry.users == 0 for entry in engine.model.pool.attached.values())


def test_many_at_once_equal_solo_runs(server, client):
    model, names = server[2], ["base", "a", "b", "c"]
    wanted = {(n, k): alone(model, n, k) for n in names for k in (3, 9, 17)}
    wrong = []

    def ask(i):
        name, tokens = names[i % 4], (3, 9, 17)[i % 3]
        answer = client.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=tokens)
        if answer.choices[0].message.content != wanted[name, tokens]:
            wrong.append((name, tokens))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_metrics(server):
    address = server[0]
    for name in "cab":  # c has to make room
        body = {"model": name, "prompt": "List", "max_tokens": 1}
        assert httpx.post(address + "/v1/completions", json=body).status_code == 200
    refused = server[1].metrics._values["refusals_total"]
    before = refused[("status", "404"),]
    assert httpx.get(address + "/v1/models/nobody").status_code == 404
    assert refused[("status", "404"),] == before + 1
    text = httpx.get(address + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    asked = sum(float(v) for k, v in values.items() if k.startswith('mlx_adapters_requests_total{model="a"'))
    assert asked > 0 and float(values["mlx_adapters_adapters_resident"]) <= 2
    assert float(values["mlx_adapters_adapter_evictions_total" + '{adapter="c"}']) > 0
    assert float(values["mlx_adapters_memory_active_bytes"]) > 0
    assert 'mlx_adapters_time_to_first_token_seconds_bucket{model="a",le="+Inf"}' in values


def test_keys_limits_and_drain(tiny_model, tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("# ours\nsecret-key-of-the-test\n")
    settings = {"api_keys": read_keys(key_file), "max_batch": 1, "max_queue": 2, "max_seconds": 3.0}
    with running(tiny_model("llama"), [], **settings) as (address, engine):
        assert httpx.get(address + "/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.get(address + "/v1/models", headers=headers).status_code == 401
        headers = {"Authorization": "Bearer secret-key-of-the-test"}
        assert httpx.get(address + "/v1/models", headers=headers).status_code == 200
        lower = {"Authorization": headers["Authorization"].replace("Bearer", "bearer")}
        assert httpx.get(address + "/v1/models", headers=lower).status_code == 200
        body = {"model": "base", "messages": CHAT, "temperature": 0}
        url = address + "/v1/chat/completions"
        forbidden = httpx.post(address + "/v1/adapters", headers=headers, json={"name": "a"})
        assert forbidden.status_code == 403 and "--allow-load" in forbidden.json()["error"]["message"]
        statuses = []
        send = lambda n: statuses.append(  # noqa: E731
            httpx.post(url, headers=headers, json=body | {"max_tokens": n}, timeout=60).status_code
        )
        engine.settings.__dict__["max_seconds"] = 0.3  # frozen for users, not for a test of lateness
        late = httpx.post(url, headers=headers, json=body | {"max_tokens": 2000}, timeout=60)
        assert late.status_code == 504
        engine.settings.__dict__["max_seconds"] = 60.0
        threads = [threading.Thread(target=send, args=(150,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(200) >= 3 and statuses.count(429) >= 1 and set(statuses) == {200, 429}
        draining = threading.Thread(target=send, args=(300,))
        draining.start()
        while not engine._batcher.rows:
            time.sleep(0.01)
    draining.join()
    assert statuses[-1] == 200


def test_reader_that_does_not_read(tiny_model):
    with running(tiny_model("llama"), [], write_seconds=0.5) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(
            {
                "model": "base",
                "messages": CHAT,
                "stream": True,
                "max_tokens": 1500,
                "logprobs": True,
                "top_logprobs": 20,
            }
        ).encode()
        with socket.create_connection((host, int(port))) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            reader.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert eventually(lambda: engine._open)
            assert eventually(lambda: not engine._open and engine._batcher.idle)


def test_a_failing_step_ends_its_requests_only(tiny_model, monkeypatch):
    with running(tiny_model("llama"), []) as (address, engine):
        body = {"model": "base", "messages": CHAT, "max_tokens": 2}
        forward = engine._batcher._forward
        monkeypatch.setattr(engine._batcher, "_forward", lambda _: (_ for _ in ()).throw(RuntimeError("no memory")))
        assert httpx.post(address + "/v1/chat/completions", json=body).status_code == 500
        monkeypatch.setattr(engine._batcher, "_forward", forward)
        assert httpx.post(address + "/v1/chat/completions", json=body).status_code == 200


def test_settings_are_checked(tmp_path, tiny_model):
    assert is_loopback("localhost") and is_loopback("::1") and not is_loopback("0.0.0.0")
    for wrong in ({"host": "0.0.0.0"}, {"max_batch": 0}, {"port": 70000}, {"max_seconds": 0.0}):
        with pytest.raises(ConfigError):
            ServeSettings(**wrong)
    for wrong in ("test", "t=a", "t=a:x", "t=a:0", "t=a:1,a:1", "=a:1", "t=a:1.2.3"):
        with pytest.raises(ConfigError):
            parse_split(wrong)
    assert parse_adapter("x=./out/a@5") == ("x", "./out/a@5") and parse_adapter("sql@600") == ("sql", "sql@600")
    for wrong in ("./folder", "x=", "bad name=a", "user/repo"):
        with pytest.raises(ConfigError):
            parse_adapter(wrong)
    keys = tmp_path / "keys"
    for content in ("", "# only\n", "short\n", "schlüssel-0123456789\n"):
        keys.write_text(content)
        with pytest.raises(ConfigError):
            read_keys(keys)
    keys.write_text("\ufeffsixteen-characters\r\n")
    assert read_keys(keys) == ("sixteen-characters",)
    for name in ("a\nb", " ", "a\x7f"):
        with pytest.raises(ConfigError, match="base's name"):
            make_engine(str(tiny_model("llama")), [], ServeSettings(), name=name)
    with pytest.raises(ConfigError, match="max_seconds"):
        ServeSettings(max_seconds=float("inf"))
    with pytest.raises(ConfigError, match="Cannot listen"):
        bind("nosuch.invalid", 0)
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="Cannot listen"):
        taken.listen()
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="used twice"):
        make_engine(str(tiny_model("llama")), [("a", "a"), ("a", "b")], ServeSettings())


def test_histogram_counts():
    metrics = Metrics()
    for value in (0.02, 0.02, 700):
        metrics.observe("time_to_first_token_seconds", value, model='a"b')
    text = metrics.text()
    assert r'seconds_bucket{model="a\"b",le="0.025"} 2' in text and r'le="120"} 2' in text
    assert r'le="+Inf"} 3' in text and r'_count{model="a\"b"} 3' in text


def test_metrics_keep_every_digit():
    metrics = Metrics()
    metrics.add("prompt_tokens_total", 123_456_789, model="a")
    metrics.add("prompt_tokens_total", 1, model="a")
    assert 'prompt_tokens_total{model="a"} 123456790\n' in metrics.text()


def test_a_name_that_is_not_latin_and_a_text_of_unknown_tokens(tiny_model):
    with running(tiny_model("llama"), [], name="模型") as (address, engine):
        url, body = address + "/v1/chat/completions", {"model": "模型", "messages": CHAT, "max_tokens": 2}
        answer = httpx.post(url, json=body)
        assert answer.status_code == 200 and unquote(answer.headers["x-adapter"]) == answer.json()["model"] == "模型"
        engine.model.vocabulary = 20
        for path, more in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": PROMPT})):
            error = httpx.post(f"{address}/v1/{path}", json={"model": "模型", **more})
            assert error.status_code == 400 and "does not know" in error.json()["error"]["message"]


@pytest.fixture
def registered(tiny_model):
    """A model folder and the names of two adapters on it, of equal size."""
    model = load_model(tiny_model("llama"))
    for i, name in enumerate(("p", "q")):
        register(random_adapter(model, seed=i + 20), name, overwrite=True)
    return tiny_model("llama"), [("p", "p"), ("q", "q")]


@pytest.mark.parametrize("grouped", [False, True])
def test_adapters_stay_within_their_bytes(registered, monkeypatch, grouped):
    """Also on a GPU, where layers in groups take more bytes than the adapter's file."""
    monkeypatch.setattr("mlx_adapters.runtime.pool.on_gpu", lambda: grouped)
    folder, adapters = registered
    size = make_engine(str(folder), adapters[:1], ServeSettings()).model.pool.nbytes
    with pytest.raises(ConfigError, match=r"'p' has 0.0 MB; all may have"):
        make_engine(str(folder), adapters, ServeSettings(max_adapter_bytes=size - 1))
    with running(folder, adapters, max_adapter_bytes=2 * size - 1) as (address, engine):
        for name in "pqp":
            body = {"model": name, "messages": CHAT, "max_tokens": 2}
            assert httpx.post(address + "/v1/chat/completions", json=body).status_code == 200
            assert engine.model.pool.nbytes == size


def test_an_adapter_of_another_base_is_refused_at_the_start(registered, tiny_model):
    """Also one for which there is no room yet."""
    folder, adapters = registered
    for most in (1, 2):
        with pytest.raises(IncompatibleError, match="other weights"):
            make_engine(str(tiny_model("llama", seed=1)), adapters[:most], ServeSettings(max_adapters=1))
    foreign = random_adapter(load_model(tiny_model("llama", seed=1)))
    register(foreign, "foreign", overwrite=True)
    with pytest.raises(IncompatibleError, match="other weights"):
        make_engine(str(folder), [*adapters, ("foreign", "foreign")], ServeSettings(max_adapters=1))


def test_no_adapter_waits_for_ever_behind_busy_ones(registered):
    """With room for one adapter and a crowd that always asks for it, the other one gets its turn."""
    folder, adapters = registered
    with running(folder, adapters, max_adapters=1) as (address, _):
        body, answered = {"messages": CHAT, "max_tokens": 40, "temperature": 0}, threading.Event()

        def crowd():
            while not answered.is_set():
                httpx.post(address + "/v1/chat/completions", json=body | {"model": "p"}, timeout=60)

        threads = [threading.Thread(target=crowd) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            asked = httpx.post(address + "/v1/chat/completions", json=body | {"model": "q"}, timeout=60)
        finally:
            answered.set()
            for thread in threads:
                thread.join()
        assert asked.status_code == 200


def test_a_damaged_adapter_and_a_dead_engine(registered, monkeypatch):
    folder, adapters = registered
    with running(folder, adapters, max_adapters=1) as (address, engine):
        url, body = address + "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}
        with monkeypatch.context() as patch:
            patch.setattr("mlx_adapters.generation.live.load_adapter", lambda _: 1 / 0)
            patch.setattr("mlx_adapters.serving.residents.load_adapter", lambda _: 1 / 0)
            assert httpx.post(url, json=body | {"model": "q"}).status_code == 503
        assert httpx.post(url, json=body | {"model": "q"}).status_code == 200
        weights = adapter_folder("p") / "adapters.safetensors"
        weights.rename(weights.with_name("away"))
        gone = httpx.post(url, json=body | {"model": "p"})
        weights.with_name("away").rename(weights)
        told = gone.json()["error"]["message"]
        assert (
            gone.status_code == 503 and "'p'" in told and str(weights.parent) not in told
        )  # whose place is no client's
        monkeypatch.setattr(engine._batcher, "step", lambda: sys.exit())
        assert httpx.post(url, json=body | {"model": "q"}).status_code == 500
        assert not engine._open
        assert httpx.post(url, json=body | {"model": "q"}).status_code == 503
        assert httpx.get(address + "/health").status_code == 503


def test_a_name_that_comes_to_mean_another_adapter_is_not_served_under_it(registered):
    """What is in memory stays; what is read again must be what it was, until it is added anew."""
    folder, adapters = registered
    other = random_adapter(load_model(folder), seed=77)
    with running(folder, adapters, max_adapters=1, allow_load=True) as (address, engine):
        url, body = address + "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2}
        for name in "pq":  # q was only looked at when the server started, p is in memory
            register(other, name, overwrite=True)
        assert httpx.post(url, json=body | {"model": "p"}).status_code == 200
        for name in "qq":
            answer = httpx.post(url, json=body | {"model": name})
            assert answer.status_code == 503 and "'q' has changed" in answer.json()["error"]["message"]
        engine.catalog.served["p"].attached = None  # as if it had been put out
        assert "'p' has changed" in httpx.post(url, json=body | {"model": "p"}).text
        assert httpx.delete(address + "/v1/adapters/q").status_code in (200, 204)
        assert httpx.post(address + "/v1/adapters", json={"name": "q", "reference": "q"}).status_code in (200, 201)
        assert httpx.post(url, json=body | {"model": "q"}).status_code == 200
        assert engine.catalog.served["q"].fingerprint == other.fingerprint


def test_memory_stays_flat(server, client):
    mx.clear_cache()
    for i in range(6):
        client.chat.completions.create(model="abc"[i % 3], messages=CHAT, max_tokens=20, temperature=0)
    mx.synchronize()
    before = mx.get_active_memory()
    for i in range(30):
        client.chat.completions.create(model="abc"[i % 3], messages=CHAT, max_tokens=20, temperature=0)
    mx.synchronize()
    assert mx.get_active_memory() < before * 1.1 + (1 << 20 if on_gpu() else 0)  # memory is given in pages there
